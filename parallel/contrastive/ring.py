"""Rows that go round the ranks of an axis: each rank meets every rank's, a chunk at a time, and holds a block of them.

At hop h a rank works on the block of the rank h places before it. A chunk of the block sets out for the next rank
before this rank begins to compute with it, and the chunk that takes its place is there when this one is done with, so
one buffer does (`parallel.messages.shift_start`), and nobody waits for a transfer unless the next rank is late. What
ranks add up for the rows of a block (gradients, the sums of a softmax) goes round after it, and ends at home.

Legend: R ranks, n rows of a rank, which may differ; n' the most that a rank has; E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.comm import Axis, Pending
from parallel.host_channel import SLOT_BYTES
from parallel.messages import shift_start


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows of one rank's block.

    Attributes:
        owner: index of that rank. hop: 0 where it is this one. span: rows of the block, the same for all ranks' blocks.
        values: [c, E], those that the owner has, perhaps none. notes: on these rows, [c, ...] each. last: whether it is
            the last of its block.
    """

    owner: int
    hop: int
    span: slice
    values: Tensor
    notes: tuple[Tensor, ...]
    last: bool

    @property
    def rows(self) -> slice:
        """Of the owner's block."""
        return slice(self.span.start, self.span.start + self.values.shape[0])


class Ring:
    """The ranks of an axis, and how many rows each of them has.

    Args:
        counts: rows of each rank. columns: the most rows of a chunk; fewer where a message would not fit into shared
            memory at once.
    """

    def __init__(self, axis: Axis, counts: Sequence[int], columns: int) -> None:
        self.axis, self.counts, self.columns = axis, tuple(counts), columns
        self.most, self.own = max(counts), counts[axis.index]

    def owner(self, hop: int) -> int:
        """Whose block this rank works on."""
        return (self.axis.index - hop) % self.axis.size

    def chunks(self, rows: Tensor, notes: Sequence[Tensor] = ()) -> Iterator[Chunk]:
        """Every rank's rows, this rank's own first.

        Values are good until the next chunk is asked for. Meanwhile one block of sums at most is passed on
        (`Homeward`): a chunk's place is taken when a second operation is started after it.

        Args:
            rows: [n, E]. notes: [n, ...] each, few bytes of a row, that go with them.
        """
        size, moving, spans = self.axis.size, rows, self.spans(rows.shape[1], rows.itemsize)
        if size > 1:
            moving, notes = _padded(rows, self.most, copy=True), [_padded(x, self.most) for x in notes]
        for hop in range(size):
            owner, moves = self.owner(hop), hop < size - 1
            coming = [shift_start(x, torch.empty_like(x), self.axis) for x in notes] if moves else []
            for span in spans:
                passing = shift_start(moving[span], moving[span], self.axis) if moves else None
                part = slice(span.start, max(span.start, min(span.stop, self.counts[owner])))
                yield Chunk(
                    owner=owner, hop=hop, span=span, values=moving[part], notes=tuple(x[part] for x in notes),
                    last=span is spans[-1],
                )  # fmt: skip
                if passing is not None:
                    passing.wait()
            notes = [x.wait() for x in coming]

    def spans(self, width: int, itemsize: int) -> list[slice]:
        """The rows of a block, [n', width], in chunks."""
        rows = max(1, min(self.columns, SLOT_BYTES // (width * itemsize)))
        return [slice(start, min(start + rows, self.most)) for start in range(0, self.most, rows)]


class Sums(Protocol):
    """Of the rows of a block, [n', ...] in `values`: what is added up in a way of its own."""

    values: Tensor

    def merge(self, other: Tensor) -> None:
        """Add others' of the same rows."""

    def clear(self) -> object:
        """Begin anew."""


class Homeward:
    """What all ranks add up for the rows of a block: goes round one hop behind it, and one more, to its owner.

    Args:
        start: [n', ...], what the sums begin with, and the memory that they are in.
    """

    def __init__(self, ring: Ring, start: Tensor) -> None:
        self._ring, self._sums = ring, start
        self._passing: dict[int, Pending] = {}

    def take(self, span: slice) -> Tensor:
        """The sums of these rows of the block that this rank works on, to add to: waits for the rank before."""
        if (passing := self._passing.pop(span.start, None)) is not None:
            passing.wait()
        return self._sums[span]

    def pass_on(self, span: slice) -> None:
        """This rank has added what it has."""
        if self._ring.axis.size > 1:
            part = self._sums[span]
            self._passing[span.start] = shift_start(part, part, self._ring.axis)

    def fold(self, block: Sums) -> None:
        """This rank is done with a whole block: what it has summed of it is added, passed on, and begun anew."""
        whole = slice(0, self._ring.most)
        sums = self.take(whole)
        block.merge(sums)
        sums.copy_(block.values)
        self.pass_on(whole)
        block.clear()

    def home(self) -> Tensor:
        """The sums of this rank's own rows, [n, ...], when all have been passed on R times."""
        for start in list(self._passing):
            self._passing.pop(start).wait()
        return self._sums[: self._ring.own]


def _padded(rows: Tensor, most: int, *, copy: bool = False) -> Tensor:
    """[n, ...] -> [n', ...], contiguous."""
    if rows.shape[0] == most and not copy:
        return rows.contiguous()
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: rows.shape[0]].copy_(rows)
    return padded
