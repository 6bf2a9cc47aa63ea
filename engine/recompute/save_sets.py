"""Save sets: which regions' outputs stay from the forward pass of a block to its backward pass.

They form a ladder: each drops more than the one before it, and takes longer to compute again. What is dropped is
computed again from what is kept; what nobody's backward pass asks for is neither kept nor computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.regions import Region

GATHER = "gather"


@dataclass(frozen=True, kw_only=True)
class SaveSet:
    """Of one block.

    Attributes:
        drops: regions whose outputs, and all that is made within them, go. As `branch.region` where only that branch
            of a block is meant: `attn` or `mlp`, or "" of a block that is one. gathers_again: whether the gathered
            input of the linears goes, too, under sequence parallelism: it is as large as on one rank, and a collective
            brings it back.
    """

    name: str
    drops: frozenset[str] = frozenset()
    gathers_again: bool = False

    def dropped(self, branch: str, region: Region) -> bool:
        """Whether outputs of a region go.

        Args:
            branch: of the block: `attn` or `mlp`; "" where it is one.
        """
        if region == GATHER:
            return self.gathers_again
        return region in self.drops or f"{branch}.{region}" in self.drops

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is computed again."""
        return not self.drops and not self.gathers_again


_LADDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("all", ()),
    ("norm", ("norm", "activation")),
    ("qk_norm", ("qk_norm",)),
    ("fc1", ("mlp.projection", ".projection")),
    ("qkv", ("projection", "qkv")),
    ("attention", ("attention",)),
    ("input", ("output", "residual", "merge")),
)
"""Name, and what it drops beside what those before it do. `all` keeps everything, `input` the block's input alone."""


def _sets() -> dict[str, SaveSet]:
    found, drops = dict[str, SaveSet](), frozenset[str]()
    for name, more in _LADDER:
        drops |= set(more)
        found[name] = SaveSet(name=name, drops=drops)
    found |= {f"{name}+gather": replace(s, name=f"{name}+gather", gathers_again=True) for name, s in found.items()}
    return found


SAVE_SETS = _sets()
"""By name, those that drop least first; those named `...+gather` also gather again."""


def save_set(name: str) -> SaveSet:
    """By its name.

    Raises:
        ValueError: there is none.
    """
    if name not in SAVE_SETS:
        raise ValueError(f"no save set is called {name!r}: take one of {', '.join(SAVE_SETS)}")
    return SAVE_SETS[name]
