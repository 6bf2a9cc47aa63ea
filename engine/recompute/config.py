"""What is kept of a forward pass: the group `recompute` of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from engine.recompute.save_sets import SaveSet, save_set
from model.patterns import Pattern, is_one_name

POLICIES = {"none": "all", "full": "input+gather", "selective": "qk_norm"}
"""Policies by name, and the save set that each gives to all blocks; `auto` chooses one for each. full is the least that
can be kept, so where sequence parallelism splits rows these are gathered again, too."""

AUTO_SHARE = 0.9
"""Of a device's memory, that a budget of `auto` is; the rest is for what its allocator cannot use, and for others."""

_UNITS = {"B": 1} | {
    f"{prefix}{end}": base**power
    for end, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("k" if base == 1000 else "K", "M", "G", "T"), start=1)
}
_FACTORS = {name.lower(): factor for name, factor in _UNITS.items()}
_NUMBER = re.compile(
    r"(?P<number>[-+]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)\s*(?P<unit>[a-z]*)", re.IGNORECASE | re.ASCII
)
_PATTERN = Pattern(
    check=save_set,
    noun="save set",
    things="blocks",
    example="input * 6, all * 6",
    example_of=lambda depth: f"input * {depth // 2}, all * {depth - depth // 2}",
)


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What of a forward pass is kept for backward, and what is computed again there."""

    policy: str | tuple[str, ...] = "none"
    """none: all is kept; full: of each block its input alone; selective: all but what is quick to compute again; auto:
    chosen block by block, within memory_budget; or a save set for all blocks (all, norm, qk_norm, fc1, qkv, attention,
    input, each also with +gather, +offload, or as docs/recompute.md says), or one for each: a list, or a pattern such
    as 'input * 6, all * 6'."""

    memory_budget: str | int | float = "auto"
    """policy auto: the most memory that a rank may take: bytes, a size with a unit (800MiB, 12GB), a share of the
    device's (0.7), or auto: nine tenths of it."""

    ahead: Literal["auto", "never"] = "auto"
    """auto: in a pipeline, a rank that would wait for a gradient computes again meanwhile what was dropped of that
    micro-batch, one at a time, which takes the memory that dropping it has saved; never: backward does all of it"""

    offload: Literal["never", "auto"] = "never"
    """policy auto: whether it may keep in the memory of the host what blocks keep (save sets ...+offload), on a GPU"""

    norm_backward: Literal["input", "output"] = "input"
    """What blocks' norms keep for backward; output: that of the norm, which linears keep anyway: less memory, but
    gradients are rounded in another way, and weights of norms must not be close to 0; needs compiled kernels"""

    def __post_init__(self) -> None:
        if self._name not in (*POLICIES, "auto"):
            try:
                _PATTERN.expand(self.policy, "recompute.policy")
            except ValueError as error:
                raise self._with_policies(error) from error
        _parsed(self.memory_budget)
        if self._name != "auto" and self.memory_budget != "auto":
            raise ValueError(
                f"recompute.memory_budget {self.memory_budget} has no effect with recompute.policy {self.as_text}, "
                "which looks at no memory: use policy auto, or leave it out"
            )

        if self._name != "auto" and self.offload == "auto":
            raise ValueError(
                f"recompute.offload auto has no effect with recompute.policy {self.as_text}, which chooses nothing: "
                "use policy auto, or name save sets ...+offload"
            )

    @property
    def _name(self) -> str:
        """The policy, if it is one text."""
        return self.policy.strip() if isinstance(self.policy, str) else ""

    @property
    def as_text(self) -> str:
        """The policy, as it was given."""
        return self._name or f"[{', '.join(self.policy)}]"

    def _with_policies(self, error: ValueError) -> ValueError:
        """The same mistake, told that there are policies, too, where one name was given for all blocks."""
        if not is_one_name(self._name):
            return error
        return ValueError(
            f"recompute.policy {self._name!r} is none of none, full, selective and auto, and "
            f"{error.__cause__}, for all blocks or for each"
        )

    def check_depth(self, depth: int) -> None:
        """Raise ValueError where there are save sets, and they are not one for each of so many blocks."""
        if not self.is_auto:
            self.sets(depth)

    def sets(self, depth: int) -> tuple[SaveSet, ...]:
        """One per block.

        Raises:
            ValueError: a number of save sets that is not `depth`.
        """
        assert not self.is_auto, "auto is replaced by what it chooses (engine.recompute_choice)"
        if self._name in POLICIES:
            return (save_set(POLICIES[self._name]),) * depth
        return tuple(save_set(name) for name in _PATTERN.parse(self.policy, depth, "recompute.policy"))

    def keeping_all(self) -> RecomputeConfig:
        """The same where no block drops anything."""
        return RecomputeConfig(ahead="never", norm_backward=self.norm_backward)

    @property
    def norm_from_output(self) -> bool:
        """Whether norms are differentiated from what they give."""
        return self.norm_backward == "output"

    def keeps_norms(self, depth: int) -> bool:
        """Whether any of so many blocks keeps what a norm gives, or may."""
        return self.is_auto or not all("norm" in of.drops for of in self.sets(depth))

    @property
    def is_auto(self) -> bool:
        """Whether save sets are still to be chosen."""
        return self._name == "auto"

    def drops(self, depth: int) -> bool:
        """Whether any of so many blocks drops something, or may."""
        return self.is_auto or any(of.drops for of in self.sets(depth))

    @property
    def offloads(self) -> bool:
        """Whether a block does, or may."""
        return self.offload == "auto" or "+offload" in self.as_text

    @property
    def gathers_again(self) -> bool:
        """Whether a block does."""
        return "+gather" in self.as_text

    @property
    def share(self) -> float:
        """Of a device's memory, that a rank may take at most: all of it, where the budget is not given as a share."""
        parsed = _parsed(self.memory_budget)
        return parsed if isinstance(parsed, float) else 1.0

    def budget(self, memory: float) -> int:
        """Bytes that a rank may take, of a device with `memory` bytes, or of its share of a host."""
        parsed = _parsed(self.memory_budget)
        return max(int(parsed * memory), 1) if isinstance(parsed, float) else parsed


def _parsed(budget: str | int | float) -> float | int:
    """A share, as a float, or bytes. Raises ValueError where it is neither."""
    text = f"{budget}".strip()
    if text == "auto":
        return AUTO_SHARE
    found = _NUMBER.fullmatch(text)
    if found is None or not isfinite(number := float(found["number"])):
        raise _wrong(budget, "which is no amount of memory")
    unit = found["unit"].lower()
    if unit and unit not in _FACTORS:
        raise _wrong(budget, f"whose unit is none of {', '.join(_UNITS)}")
    is_share = not unit and not found["number"].lstrip("+-").replace("_", "").isdigit()
    if number <= 0:
        raise _wrong(budget, "which must be positive")
    if is_share and number > 1:
        raise _wrong(budget, "which as a share of the device's memory is more than all of it")
    amount = number if is_share else round(number * _FACTORS[unit]) if unit else int(found["number"])
    if not is_share and not 1 <= amount < 2**63:
        raise _wrong(budget, f"which is {'less than a byte' if amount < 1 else 'more than 64 bits can count'}")
    return amount


def _wrong(budget: object, what: str) -> ValueError:
    return ValueError(
        f"recompute.memory_budget is {budget}, {what}: give a whole number of bytes, a size such as 800MiB or 12GB, a "
        "share such as 0.7, or auto"
    )
