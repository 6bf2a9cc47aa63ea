"""The logical matrices that flat fragments are pieces of, and working on each matrix whole, on one rank.

A parameter is one matrix, or one per segment where several are fused: q, k, v and fc1 are four. Shards cut it anywhere,
in the middle of a row too; so a flat range of elements is a few rectangles of each matrix, its `Block`s.

`Exchange` deals the matrices to the ranks, sends every rank's pieces to the one that works on them, and the results to
all that train these elements: Newton-Schulz of Muon is sharded so by Liu et al. 2025 (Muon is scalable for LLM
training). One matrix per rank is under way at a time, so beside the pieces a rank needs memory for one matrix, not for
the model.

Legend: M, N rows and columns of a logical matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from parallel import comm
from parallel.layout import TensorLayout
from parallel.sharding.boxes import placed_boxes
from parallel.sharding.fragments import Fragments, Holding


class Block(NamedTuple):
    """A rectangle of one of a parameter's matrices, and where it lies in a flat range of elements.

    Attributes:
        segment: which matrix. row, col, rows, cols: the rectangle in it.
        offset: of its first element in the flat range. stride: elements from one row to the next there.
    """

    segment: int
    row: int
    col: int
    rows: int
    cols: int
    offset: int
    stride: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    def of(self, flat: Tensor) -> Tensor:
        """Its elements [rows, cols] of the flat range, as a view."""
        return flat.as_strided((self.rows, self.cols), (self.stride, 1), flat.storage_offset() + self.offset)

    def within(self, matrix: Tensor) -> Tensor:
        """Its elements [rows, cols] of the logical matrix [M, N], as a view."""
        return matrix[self.row : self.row + self.rows, self.col : self.col + self.cols]


def matrix_shapes(layout: TensorLayout) -> list[tuple[int, int]]:
    """(M, N) of each matrix of a parameter. One dimension counts as rows of one column, a third one as columns."""
    rows, cols = _matrix_shape(layout.shape)
    if layout.dim is None:
        return [(rows, cols)]
    return [(segment, cols) if layout.dim == 0 else (rows, segment) for segment in layout.segments]


def blocks(layout: TensorLayout, start: int, stop: int) -> list[Block]:
    """What elements [start, stop) of the flattened local part of `layout` are, matrix by matrix, row by row."""
    assert layout.dim in (None, 0) or (layout.dim == 1 and len(layout.shape) == 2), layout
    firsts = [0, *accumulate(layout.segments)]  # of each segment, along layout.dim
    found = []
    for box, segment, offset, (stride, _) in placed_boxes(
        replace(layout, shape=_matrix_shape(layout.shape)), start, stop, by_segment=True
    ):
        (row, col), (rows, cols), first = box.offset, box.shape, firsts[segment]
        row, col = (row, col - first) if layout.dim == 1 else (row - first, col)
        found.append(Block(segment, row, col, rows, cols, offset, stride))
    return sorted(found, key=lambda block: block.segment)  # and in order within


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1), prod(shape[1:])


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each piece of work: the dearest first, each to the rank with the least so far (Graham 1969)."""
    owners, load = [0] * len(costs), [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


@dataclass(frozen=True)
class Matrix:
    """A logical matrix [rows, cols]: `segment` of the parameter at index `fragment`, worked on by the rank `owner`."""

    fragment: int
    segment: int
    rows: int
    cols: int
    owner: int


@dataclass(frozen=True)
class _Round:
    """At most one matrix per rank, in order of owner, and what must move.

    Attributes:
        matrices: the round's. mine: this rank's.
        own, trained: for each matrix, the blocks of this rank's fragment that it accounts for, and that it trains.
        owned_by, trained_by: of my matrix, the same of each rank; offsets mean nothing there.
    """

    matrices: list[Matrix]
    mine: Matrix | None
    own: list[list[Block]]
    trained: list[list[Block]]
    owned_by: list[list[Block]]
    trained_by: list[list[Block]]


class Exchange:
    """Works on logical matrices, each whole on one rank.

    Args:
        fragments: of this rank, and who holds the rest. members: indices of the fragments whose matrices are wanted.
        cost: of the work on a matrix [M, N], by which the ranks are given equal shares.
        dtype: in which matrices travel and are worked on.
    """

    def __init__(
        self, fragments: Fragments, members: Sequence[int], cost: Callable[[int, int], float], dtype: torch.dtype
    ) -> None:
        self.fragments, self.axis, self.dtype = fragments, fragments.axis, dtype
        found = [
            (i, segment, rows, cols)
            for i in members
            for segment, (rows, cols) in enumerate(matrix_shapes(fragments.fragments[i].info.layout))
        ]
        costs = [cost(rows, cols) for *_, rows, cols in found]
        owners = deal(costs, self.axis.size)
        # each rank starts with its dearest matrix, so that those of a round take about as long
        order = sorted(range(len(found)), key=lambda i: -costs[i])
        lists = [[Matrix(*found[i], owner) for i in order if owners[i] == owner] for owner in range(self.axis.size)]
        self.rounds = [
            self._plan([matrices[k] for matrices in lists if k < len(matrices)])
            for k in range(max(map(len, lists), default=0))
        ]

    def run(
        self,
        read: Callable[[int, Block], Tensor],
        work: Callable[[Tensor], Tensor],
        write: Callable[[Matrix, Block, Tensor], None],
    ) -> None:
        """Collective. `read(fragment, block)` gives [rows, cols] of this rank's fragment, `work` makes [M, N] of
        [M, N], and `write(matrix, block, result)` takes [rows, cols] of that for each block that this rank trains.
        """
        for turn in self.rounds:
            matrix = self._assemble(turn, read)
            self._deal_back(turn, None if matrix is None else work(matrix), write)

    def _assemble(self, turn: _Round, read: Callable[[int, Block], Tensor]) -> Tensor | None:
        """This rank's matrix of the round, [M, N], if it has one."""
        pieces = [read(m.fragment, block) for m, found in zip(turn.matrices, turn.own, strict=True) for block in found]
        arrived = comm.all_to_all_rows(
            self._flat(pieces), self._sizes(turn, turn.own), [_count(found) for found in turn.owned_by], self.axis
        )
        if turn.mine is None:
            return None
        matrix = arrived.new_empty(turn.mine.rows, turn.mine.cols)
        there = [block for found in turn.owned_by for block in found]
        for block, part in zip(there, arrived.split([block.numel for block in there]), strict=True):
            block.within(matrix).copy_(part.view(block.rows, block.cols))
        return matrix

    def _deal_back(self, turn: _Round, result: Tensor | None, write: Callable[[Matrix, Block, Tensor], None]) -> None:
        pieces = [block.within(result) for found in turn.trained_by for block in found] if result is not None else []
        arrived = comm.all_to_all_rows(
            self._flat(pieces), [_count(found) for found in turn.trained_by], self._sizes(turn, turn.trained), self.axis
        )
        wanted = [(m, block) for m, found in zip(turn.matrices, turn.trained, strict=True) for block in found]
        for (matrix, block), part in zip(wanted, arrived.split([block.numel for _, block in wanted]), strict=True):
            write(matrix, block, part.view(block.rows, block.cols))

    def _flat(self, pieces: list[Tensor]) -> Tensor:
        """One after the other, [elements]."""
        none = torch.empty(0, dtype=self.dtype, device=self.fragments.fragments[0].weight.device)
        return torch.cat([none, *(piece.to(self.dtype).flatten() for piece in pieces)])

    def _sizes(self, turn: _Round, found: list[list[Block]]) -> list[int]:
        """Elements that this rank exchanges with each owner."""
        by_owner = {m.owner: _count(blocks) for m, blocks in zip(turn.matrices, found, strict=True)}
        return [by_owner.get(rank, 0) for rank in range(self.axis.size)]

    def _plan(self, matrices: list[Matrix]) -> _Round:
        owned, trained, me, ranks = self.fragments.owned, self.fragments.trained, self.axis.index, range(self.axis.size)
        mine = next((m for m in matrices if m.owner == me), None)
        turn = _Round(
            matrices,
            mine,
            own=[self._blocks(owned, m, me) for m in matrices],
            trained=[self._blocks(trained, m, me) for m in matrices],
            owned_by=[self._blocks(owned, mine, rank) if mine else [] for rank in ranks],
            trained_by=[self._blocks(trained, mine, rank) if mine else [] for rank in ranks],
        )
        assert mine is None or sum(map(_count, turn.owned_by)) == mine.rows * mine.cols, (mine, owned)
        return turn

    def _blocks(self, holdings: Mapping[str, list[Holding]], matrix: Matrix, rank: int) -> list[Block]:
        """What `rank` holds of the matrix; offsets count from the start of this rank's fragment."""
        fragment = self.fragments.fragments[matrix.fragment]
        return [
            block._replace(offset=block.offset + holding.start - fragment.start)
            for holding in holdings[fragment.name]
            if holding.rank == rank
            for block in blocks(holding.layout, holding.start, holding.stop)
            if block.segment == matrix.segment
        ]


def _count(found: list[Block]) -> int:
    return sum(block.numel for block in found)
