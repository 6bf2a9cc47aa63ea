"""What the formats of other libraries share: what a checkpoint says of its model, and rules between tensors.

A format describes each of our logical tensors (`blocks.3.attn.qkv.weight`, as `VisionTransformer` names them) by a
rule: which of the other library's tensors it is made of, and how. A rule works both ways, so what is read and written
again is the same bit for bit. Names and shapes of the other side follow from the rules, run on the meta device: nothing
is read, and no model built, to know what there should be.

Legend: D width, C channels, P patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.config import ModelConfig

Shape = tuple[int, ...]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Entry(NamedTuple):
    """A tensor of a source."""

    shape: Shape
    dtype: torch.dtype


class ConversionError(ValueError):
    """A checkpoint cannot be converted: it is of another kind, damaged, or has what the other side cannot express."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a photograph to the model's input.

    Attributes:
        mean, std: subtracted from pixels in 0..1, then divided by; one number per channel.
        interpolation: with which it is resized. crop_fraction: the central part of the resized photograph that is the
            input. squash: both sides are resized to the input's, else the shorter side is, and the ratio kept.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    crop_fraction: float = 1.0
    squash: bool = False


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from, so that what says nothing of its weights (names of classes, rates of dropout) is not
    lost on the way back.

    Attributes:
        kind: of format. variant: of it, as that format has them (the class whose weights they are).
        config, preprocessor: its `config.json` and `preprocessor_config.json`, as they were.
    """

    kind: str
    variant: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is to be known of a model beside its tensors.

    Attributes:
        model: resolved. preprocessing: of its images, if that is known. origin: where it came from, if elsewhere.
        labels: names of its classes in order, if known.
    """

    model: ModelConfig
    preprocessing: Preprocessing | None = None
    origin: Origin | None = None
    labels: tuple[str, ...] = ()


# -- ways from tensors to tensors --------------------------------------------------------------------------------------


class Way(Protocol):
    """From the other library's tensors to one of ours, and back, both without loss."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """Of those of a rule, in its order."""

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The inverse. Raises ConversionError where ours has what theirs cannot express."""


@dataclass(frozen=True)
class Same:
    """One tensor, element by element; in another shape if one is given."""

    ours: Shape | None = None
    theirs: Shape | None = None

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        (x,) = theirs
        return x if self.ours is None else x.reshape(self.ours)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [ours if self.theirs is None else ours.reshape(self.theirs)]


@dataclass(frozen=True)
class Permuted:
    """One tensor, its dims in another order, and in another shape on our side.

    Attributes:
        theirs: its shape there. dims: ours are theirs in this order. ours: the shape that they then have here.
    """

    theirs: Shape
    dims: tuple[int, ...]
    ours: Shape

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        (x,) = theirs
        return x.reshape(self.theirs).permute(self.dims).reshape(self.ours)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        back = [self.dims.index(i) for i in range(len(self.dims))]
        return [ours.reshape([self.theirs[d] for d in self.dims]).permute(back).contiguous()]


@dataclass(frozen=True)
class Joined:
    """Several tensors, one after the other along a dim of ours: q, k and v, for example.

    Attributes:
        parts: length of each along `dim` of ours. each: the way of every one of them. dim: of ours.
    """

    parts: tuple[int, ...]
    each: Way = field(default_factory=Same)
    dim: int = 0

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        return torch.cat([self.each.to_ours([x]) for x in theirs], self.dim)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [y for x in ours.split(self.parts, self.dim) for y in self.each.to_theirs(x)]


@dataclass(frozen=True)
class Reordered:
    """One tensor whose segments along a dim stand in another order there.

    Attributes:
        lengths: of the segments, in our order. order: theirs are ours in this order. each: the way of each segment.
    """

    lengths: tuple[int, ...]
    order: tuple[int, ...]
    dim: int = 0

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        (x,) = theirs
        parts = x.split([self.lengths[i] for i in self.order], self.dim)
        return torch.cat([parts[self.order.index(i)] for i in range(len(parts))], self.dim)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        parts = ours.split(self.lengths, self.dim)
        return [torch.cat([parts[i] for i in self.order], self.dim)]


@dataclass(frozen=True)
class Chosen:
    """One tensor, of which ours is made by an index along a dim, one to one.

    Attributes:
        index: ours[i] = theirs[index[i]].
    """

    index: tuple[int, ...]
    dim: int = 0

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        (x,) = theirs
        return x.index_select(self.dim, torch.tensor(self.index, device=x.device))

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [ours.index_select(self.dim, torch.tensor(self.index, device=ours.device).argsort())]


@dataclass(frozen=True)
class Kept:
    """One tensor, of which ours has some ranges along a dim; on the way back the others are zeros.

    Attributes:
        ranges: (first, stop) of what is kept. length: there. theirs, ours: shapes, as in `Same`; `dim` is of theirs.
    """

    ranges: tuple[tuple[int, int], ...]
    length: int
    dim: int = 0
    ours: Shape | None = None
    theirs: Shape | None = None

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        (x,) = theirs
        kept = torch.cat([x.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim)
        return kept if self.ours is None else kept.reshape(self.ours)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        shape = list(self.theirs or ours.shape)
        shape[self.dim] = self.length
        whole, done = ours.new_zeros(shape), 0
        sides = list(shape)
        sides[self.dim] = sum(b - a for a, b in self.ranges)
        kept = ours.reshape(sides)
        for a, b in self.ranges:
            whole.narrow(self.dim, a, b - a).copy_(kept.narrow(self.dim, done, b - a))
            done += b - a
        return [whole]


@dataclass(frozen=True)
class Sum:
    """Ours is the sum of several of equal shape there (two biases that are added to the same output); on the way back
    the first has all of it, the others are zero."""

    count: int = 2

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        return (
            torch.stack(list(theirs))
            .sum(0, dtype=torch.promote_types(theirs[0].dtype, torch.float32))
            .to(theirs[0].dtype)
        )

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [ours, *(torch.zeros_like(ours) for _ in range(self.count - 1))]


@dataclass(frozen=True)
class Constant:
    """Ours is a constant, where the other side has no such tensor: a bias of zeros. What was trained away from it
    cannot be expressed there."""

    shape: Shape
    value: float = 0.0

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        assert not theirs
        return torch.full(self.shape, self.value)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        if not ours.is_meta and bool((ours != self.value).any()):
            raise ConversionError(f"the other library has no such tensor, and here it is not {self.value:g} throughout")
        return []


@dataclass(frozen=True)
class Void:
    """The other side has a tensor where ours has none: a constant. What was trained away from it is a reason to give
    our model that tensor, or to refuse."""

    shape: Shape
    value: float = 0.0

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way: nothing."""
        (x,) = theirs
        if not x.is_meta and bool((x != self.value).any()):
            raise ConversionError(f"this model has no such tensor, and there it is not {self.value:g} throughout")
        return torch.empty(0)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [torch.full(self.shape, self.value, device=ours.device, dtype=ours.dtype)]


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


def count(shape: Shape) -> int:
    """Elements."""
    return math.prod(shape)
