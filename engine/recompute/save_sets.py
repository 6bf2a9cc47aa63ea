"""Save sets: which regions' outputs stay from the forward pass of a block to its backward pass.

What is dropped is computed again from what is kept; what nobody's backward pass asks for is neither kept nor computed
again. Sets have names. Some form a ladder, each dropping more than the one before it; others drop more than one of
these, but not all that the next one does: `qk_norm-attention` is `qk_norm` without attention's output either.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import get_args

from model.regions import Region

LADDER = ("all", "norm", "qk_norm", "fc1", "qkv", "attention", "input")
"""Each drops what the one before it does, and: nothing; outputs of norms and activations; of QK norm; of fc1; of qkv;
of attention; of the output projection. `all` keeps everything, `input` the block's input alone.
"""
DROPPABLE = ("norm", "activation", "qk_norm", "fc1", "qkv", "attention", "output", "merge", "gather")
"""What can go. fc1 and qkv: the two parts of the projection; output: also the residual sums; gather: the gathered
input of the linears under sequence parallelism, as large as on one rank, which a collective brings back.
"""
_ADDS = {
    "all": (), "norm": ("norm", "activation"), "qk_norm": ("qk_norm",), "fc1": ("fc1",), "qkv": ("qkv",),
    "attention": ("attention",), "input": ("output", "merge"),
}  # fmt: skip


@dataclass(frozen=True)
class SaveSet:
    """Of one block.

    Attributes:
        drops: of DROPPABLE. offloads: whether what is kept is in host memory from forward to backward.
    """

    drops: frozenset[str] = frozenset()
    offloads: bool = False

    @property
    def keeps_all(self) -> bool:
        """Where it is."""
        return not (self.drops or self.offloads)

    @property
    def name(self) -> str:
        """The rung of the ladder, what goes beside it after a `-`, `+gather`, and `+offload`."""
        rung = max((r for r in LADDER if _rung(r) <= self.drops), key=LADDER.index)
        beside = [f"-{item}" for item in DROPPABLE if item in self.drops - _rung(rung) - {"gather"}]
        return rung + "".join(beside) + "+gather" * ("gather" in self.drops) + "+offload" * self.offloads

    def dropped(self, branch: str, region: Region) -> bool:
        """Whether outputs of a region go.

        Args:
            branch: of the block: `attn` or `mlp`; "" where it is one.
        """
        match region:
            case "projection":
                parts = {"attn": {"qkv"}, "mlp": {"fc1"}}.get(branch, {"qkv", "fc1"})
                return bool(parts & self.drops)
            case "residual":
                return "output" in self.drops
            case _:
                return region in self.drops


def _rung(name: str) -> frozenset[str]:
    return frozenset(item for rung in LADDER[: LADDER.index(name) + 1] for item in _ADDS[rung])


def save_set(name: str) -> SaveSet:
    """By its name: a rung of the ladder, then any of DROPPABLE, each after a `-`, then perhaps `+gather`, `+offload`.

    Raises:
        ValueError: there is none of that name.
    """
    kept = name.removesuffix("+offload")
    rung, *beside = kept.removesuffix("+gather").split("-")
    if rung not in LADDER:
        raise ValueError(
            f"no save set is called {name!r}: take one of {', '.join(LADDER)}, to which +gather and then +offload may "
            "be added"
        )
    if wrong := [item for item in beside if item not in DROPPABLE]:
        raise ValueError(f"save set {name!r}: {wrong[0]!r} is nothing that can go: take of {', '.join(DROPPABLE)}")
    gather = {"gather"} if kept.endswith("+gather") else set[str]()
    return SaveSet(_rung(rung) | set(beside) | gather, offloads=kept != name)


def _choices() -> dict[str, SaveSet]:
    cheap, dear = _rung("qk_norm"), ("fc1", "qkv", "attention", "output")
    subsets = [frozenset(some) for count in range(len(dear) + 1) for some in combinations(dear, count)]
    sets = [_rung("all"), _rung("norm"), *(cheap | some for some in subsets)]
    sets = [drops | {"merge"} if drops >= _rung("attention") | {"output"} else drops for drops in sets]
    found = [SaveSet(drops | gather) for gather in (frozenset[str](), frozenset({"gather"})) for drops in sets]
    return {of.name: of for of in found}


SAVE_SETS = _choices()
"""Those that a scheduler chooses from, by name: what is dear to compute again goes in any combination, once all goes
that is cheap. Those that do not gather again come first.
"""
assert set(DROPPABLE) <= set(get_args(Region)) and set(LADDER) <= set(SAVE_SETS)
