"""Ways from another library's tensors to ours and back, each without loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from model.formats.base import ConversionError, Shape


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
class AtMost:
    """One number, a logarithm, in the shape [1], which counts here as no more than that of `most`; there as it is.

    Attributes:
        theirs: its shape there.
    """

    most: float
    theirs: Shape

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """As Way."""
        (x,) = theirs
        return x.reshape(1)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [ours.clamp(max=math.log(self.most)).reshape(self.theirs)]


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
