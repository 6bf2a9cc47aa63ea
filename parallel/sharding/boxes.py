"""Boxes of logical tensors: what a flat range of a shard is, whatever the layout, and what two of them have in common.

A shard cuts a tensor anywhere, in the middle of a row too. A flat range of elements of a tensor of n dimensions is at
most 2n - 1 boxes: the end of a row, whole rows, the beginning of one, and so on inwards; and where a tensor is split
over ranks segment by segment, each of these is a few boxes of the logical tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from operator import lt
from typing import NamedTuple

from torch import Tensor

from parallel.layout import TensorLayout


class Box(NamedTuple):
    """Elements [offset, offset + shape) of a tensor, along each of its dimensions."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def common(self, other: Box) -> Box | None:
        """What is in both, None if nothing is."""
        offset = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = (min(a, b) for a, b in zip(self.end, other.end, strict=True))
        shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(offset, shape) if all(length > 0 for length in shape) else None

    @property
    def end(self) -> tuple[int, ...]:
        """First index after it, along each dimension."""
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))

    def of(self, values: Tensor, start: tuple[int, ...]) -> Tensor:
        """Its elements in `values`, whose first element is the tensor's element `start`: a view."""
        return values[tuple(slice(a - s, b - s) for a, b, s in zip(self.offset, self.end, start, strict=True))]


class PlacedBox(NamedTuple):
    """A box of a logical tensor, and where it lies in a flat range of elements.

    Attributes:
        box: in the logical tensor. segment: of the layout, in which it is.
        start: of its first element in the flat range. strides: there, in elements, along each dimension.
    """

    box: Box
    segment: int
    start: int
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in the flat range, a view of the box's shape."""
        return flat.as_strided(self.box.shape, self.strides, flat.storage_offset() + self.start)


def whole_box(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def overlapping(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes of one tensor that have something in common, None if there are none."""
    if len(boxes) < 2:
        return None
    dims = range(len(boxes[0].shape))
    if not dims:
        return boxes[0], boxes[1]
    dim = max(dims, key=lambda d: len({box.offset[d] for box in boxes}))  # along which fewest lie side by side
    open_: list[tuple[Box, tuple[int, ...]]] = []
    for box in sorted(boxes, key=lambda box: box.offset[dim]):
        end = box.end
        open_ = [found for found in open_ if found[1][dim] > box.offset[dim]]
        for other, its_end in open_:
            if all(map(lt, other.offset, end)) and all(map(lt, box.offset, its_end)):
                return other, box
        open_.append((box, end))
    return None


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a flattened tensor, as boxes in order."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = shape[1:]
    row, head = divmod(start, prod(inner))
    if head:
        end = min(stop, (row + 1) * prod(inner))
        yield from _within_row(row, inner, head, end - row * prod(inner))
        row, start = row + 1, end
    last, tail = divmod(stop, prod(inner))
    if row < last:
        yield Box((row, *(0 for _ in inner)), (last - row, *inner))
    if tail and start < stop:
        yield from _within_row(last, inner, 0, tail)


def _within_row(row: int, inner: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for offset, shape in boxes_of_range(inner, start, stop):
        yield Box((row, *offset), (1, *shape))


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next along each dimension, where a tensor of `shape` lies row by row."""
    return tuple(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1] if shape else ()


def placed_boxes(layout: TensorLayout, start: int, stop: int, *, by_segment: bool = False) -> list[PlacedBox]:
    """What elements [start, stop) of the flattened local part of `layout` are of the logical tensor.

    Args:
        by_segment: no box reaches over two segments, also where the tensor is not split.
    """
    shape, found = layout.local_shape, []
    if not layout.is_sharded and not by_segment:
        layout = TensorLayout(shape=layout.shape)
    strides = strides_of(shape)
    for local in boxes_of_range(shape, start, stop):
        for segment, (box, offset) in enumerate(_logical(layout, local)):
            if box is not None:
                place = sum(i * stride for i, stride in zip(offset, strides, strict=True))
                found.append(PlacedBox(box, segment, place - start, strides))
    return found


def _logical(layout: TensorLayout, local: Box) -> Iterator[tuple[Box | None, tuple[int, ...]]]:
    """Of each segment, what a box of the local part is of the logical tensor, None if nothing; and where it begins in
    the local part.
    """
    if layout.dim is None:
        yield local, local.offset
        return
    before, dim = local.offset, layout.dim
    for piece in layout.pieces:
        start = max(before[dim], piece.local_start)
        length = min(local.end[dim], piece.local_start + piece.length) - start
        here = (*before[:dim], start, *before[dim + 1 :])
        offset = (*before[:dim], start - piece.local_start + piece.global_start, *before[dim + 1 :])
        shape = (*local.shape[:dim], length, *local.shape[dim + 1 :])
        yield (Box(offset, shape) if length > 0 else None), here
