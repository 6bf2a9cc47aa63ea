"""The state of a run as pieces of logical tensors: what checkpoints, conversion, comparison and inspection work on.

Weights, moments, factors, averages, loss scale, fp8 histories: whatever its form in memory, each is listed as parts of
logical tensors, whose shapes do not hang on the layout, with who holds what of them. Padding is in no piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from parallel.comm import Axis
from parallel.layout import TensorLayout
from parallel.sharding.boxes import Box, placed_boxes
from parallel.sharding.fragments import Holding, Part


@dataclass(frozen=True, eq=False)
class StatePiece:
    """Elements [start, stop) of one logical tensor, of the flattened part of it that `layout` gives this tensor rank.

    Attributes:
        name: what it is, and of which parameter: `weights/blocks.3.in_proj.weight`, `optimizer.exp_avg/...`.
        layout: the logical tensor, and this rank's part of it. Elements are counted in that part, flattened.
        own: of start to stop, counted from start, what this rank accounts for: the `own` of all ranks of `axis` cover
            the logical tensor once.
        values: flat [stop - start]: the memory itself, or a copy of what has another form in memory (numbers of the
            host, such as loss scale and counts; fp8 histories).
        axis: the ranks among which the tensor is shared. holders: what each of them holds of it, this one included.
    """

    name: str
    layout: TensorLayout
    start: int
    stop: int
    own: slice
    values: Tensor = field(repr=False)
    axis: Axis = field(repr=False)
    holders: Sequence[Holding] = field(repr=False)

    def boxes(self, *, own: bool = False) -> Iterator[tuple[Box, Tensor]]:
        """Boxes of the logical tensor that its elements are, each with a view of `values`, of the box's shape.

        Args:
            own: of what this rank accounts for alone.
        """
        part = self.own if own else slice(0, self.stop - self.start)
        values = self.values[part]
        for placed in placed_boxes(self.layout, self.start + part.start, self.start + part.stop):
            yield placed.box, placed.of(values)


def pieces_of(
    what: str, values: Tensor, parts: Iterable[Part], holders: Mapping[str, Sequence[Holding]], axis: Axis
) -> Iterator[StatePiece]:
    """The pieces of an array that has an element for each of a flat array of parameters.

    Args:
        what: stands before the parameters' names. parts: of the array. holders: of each parameter, along `axis`.
    """
    for part in parts:
        if part.start < part.stop:
            here = values[part.offset : part.offset + part.stop - part.start]
            name = f"{what}/{part.name}"
            yield StatePiece(name, part.layout, part.start, part.stop, part.own, here, axis, holders[part.name])


def whole_piece(name: str, values: Tensor, axis: Axis) -> StatePiece:
    """A tensor of which every rank of `axis` has all; the first accounts for it."""
    layout, count = TensorLayout(shape=tuple(values.shape)), values.numel()
    holders = [Holding(rank, layout, 0, count) for rank in range(axis.size)]
    own = slice(0, 0 if axis.index else count)
    return StatePiece(name, layout, 0, count, own, values.reshape(-1), axis, holders)
