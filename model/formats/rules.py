"""Rules between another library's tensors and ours; what there should be follows from them.

A format describes each of our logical tensors (`blocks.3.attn.qkv.weight`, as `VisionTransformer` names them) by a
rule: which of the other library's tensors it is made of, and how. A rule works both ways, so what is read and written
again is the same bit for bit. Names and shapes of the other side follow from the rules, run on the meta device: nothing
is read, and no model built, to know what there should be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.formats.base import ConversionError, Shape
from model.formats.ways import Same, Way


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one of our tensors stands there.

    Attributes:
        ours: its name, empty with the way `Void`. theirs: names there. way: between them.
        reads: names there that another rule writes, of which ours is made too: the way has them after `theirs`.
        more: others of ours in the same tensors there: the way is that of all, one after the other along dim 0.
    """

    ours: str
    theirs: tuple[str, ...]
    way: Way = field(default_factory=Same)
    reads: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """All tensors there that ours is made of."""
        return self.theirs + self.reads

    @property
    def names(self) -> tuple[str, ...]:
        """All of ours."""
        return (self.ours, *self.more) if self.ours else ()

    def joined(self, read: Callable[[str], Tensor]) -> Tensor:
        """All of ours as one, each read by its name."""
        parts = [read(name) for name in self.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(0)

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """Raises ConversionError, which names the tensor."""
        try:
            return self.way.to_ours(theirs)
        except ConversionError as error:
            raise ConversionError(f"{self.theirs[0]}: {error}") from error

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Raises ConversionError, which names the tensor."""
        try:
            out = self.way.to_theirs(ours)
        except ConversionError as error:
            raise ConversionError(f"{self.ours}: {error}") from error
        assert len(out) == len(self.theirs), self
        return out


def rule(ours: str, *theirs: str, way: Way | None = None, more: Sequence[str] = ()) -> Rule:
    """A rule in short: names of theirs in the order of the way."""
    return Rule(ours=ours, theirs=theirs, way=way or Same(), more=tuple(more))


def entry(stack: str, index: int) -> str:
    """The name, in a rule, of one entry along the first dim of a tensor there: layers that are stacked (big_vision's
    scan). So rules are the same where they are not."""
    return f"{stack}#{index}"


def place_of(name: str) -> tuple[str, int | None]:
    """Of a name in a rule: the tensor there, and the entry of it; None for the whole."""
    stack, _, index = name.partition("#")
    return stack, int(index) if index else None


def stacked(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the tensors there, from those of the names in rules."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        stack, index = place_of(name)
        found[stack] = shape if index is None else (max(index + 1, *found.get(stack, (0,))[:1]), *shape)
    return found


def expected(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of the other library's tensors, in the order of the rules.

    Args:
        shapes: of all our tensors, which the rules must name once each.
    """
    named = [name for r in rules for name in r.names]
    assert sorted(named) == sorted(shapes), sorted(set(named) ^ set(shapes))[:5] or "a tensor has two rules"
    found: dict[str, Shape] = {}
    for r in rules:
        ours = r.joined(lambda name: torch.empty(shapes[name], device="meta")).to("meta")
        for name, x in zip(r.theirs, r.to_theirs(ours), strict=True):
            assert name not in found, name
            found[name] = tuple(x.shape)
    return found
