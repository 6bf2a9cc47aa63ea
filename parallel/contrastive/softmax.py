"""Which of all others belongs to this one? InfoNCE both ways over the pairs of all ranks (Radford et al. 2021, CLIP).

loss = 1/2N sum_i (log sum_j exp s_ij - s_ii) + 1/2N sum_j (log sum_i exp s_ij - s_jj), s = scale left right'. Blocks
of s are made twice. The first sweep adds up rows and columns under running maxima: a rank's rows meet all columns, and
the sums of columns go round behind them. The second turns blocks into derivatives,

    ds_ij = (exp(s_ij - row_i) + exp(s_ij - column_j) - 2 [i = j]) / 2N,

(row_i and column_j in two parts, see `logsums.part_`) and these into gradients: four products of n x N x E for each
rank in all, where autograd takes six for the two directions and keeps their n x N logits. Where no logit can be larger
than BOUND, whatever its sign, exponentials need no maxima, and one serves row and column.

Legend: n rows of this rank, N of all ranks, E width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.contrastive.logsums import BOUND, LogSums, log_shares, log_sum, part_
from parallel.contrastive.pairs import Gradients, agree
from parallel.contrastive.ring import Chunk, Homeward, Ring
from parallel.contrastive.tiles import ROWS, Tiles, diagonal, dot_of_rows


@torch.no_grad()
def info_nce(
    left: Tensor, right: Tensor, scale: Tensor, axis: Axis, *, symmetric: bool = True, right_grad: bool = True,
    block: int = ROWS,
) -> Gradients:  # fmt: skip
    """The loss over the pairs of all ranks, and its gradients. Collective.

    Args:
        left, right: [n, E], row i of both a pair; n may differ among ranks. scale: [], 1 / temperature, the same on all
            ranks. axis: the ranks. symmetric: whether right rows look for their left ones, too; the loss is then the
            mean of both ways. right_grad: whether right rows have a gradient. block: the most rows and columns of a
            block of logits.

    Raises:
        ValueError: shapes or types do not fit; no rank has a pair.
    """
    sizes = agree(left, right, scale, axis)
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right = left.detach().to(wide).contiguous(), right.detach().to(wide).contiguous()
    ring, total = Ring(axis, sizes.right, block), sum(sizes.left)
    columns = ring.spans(right.shape[1], right.itemsize)[0].stop
    tiles = Tiles(left, block, columns, scale)
    weight = 1 / total / (2 if symmetric else 1)
    bounded = sizes.bound <= BOUND
    sums = _first_sweep(left, right, ring, tiles, bounded=bounded, columns=symmetric)
    loss = (log_sum(sums.rows) - sums.pairs.double()).sum()
    if sums.columns is not None:
        loss += (log_sum(sums.columns) - sums.pairs.double()).sum()
    grads = _second_sweep(left, right, ring, tiles, sums, bounded=bounded, right_grad=right_grad)
    by_scale = dot_of_rows(left, grads[0]) * weight
    factor = scale.detach().to(wide).reshape(()) * weight
    return Gradients(
        loss=(loss * weight).to(wide),
        left=grads[0].mul_(factor),
        right=None if grads[1] is None else grads[1].mul_(factor),
        scale=by_scale.to(wide),
    )


def pair_sums(left: Tensor, right: Tensor, ring: Ring, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Of this rank's rows and columns of logits what `LogSums` says, [n, 2] each, whatever the logits' size."""
    sums = _first_sweep(left, right, ring, tiles, bounded=False, columns=True)
    assert sums.columns is not None
    return sums.rows, sums.columns


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Of this rank's rows and columns (None where not asked for) what `LogSums` says, [n, 2] each, and the logits of
    its pairs, [n]."""

    rows: Tensor
    columns: Tensor | None
    pairs: Tensor


def _first_sweep(left: Tensor, right: Tensor, ring: Ring, tiles: Tiles, *, bounded: bool, columns: bool) -> _Sums:
    rows = LogSums.none(left.shape[0], left, bounded=bounded)
    pairs = left.new_empty(left.shape[0])
    block = behind = None
    if columns:  # of the block's columns, over this rank's rows
        block = LogSums.none(ring.most, left, bounded=bounded)
        behind = Homeward(ring, LogSums.none(ring.most, left, bounded=bounded).values)
    for chunk in ring.chunks(right):
        for own, tile in tiles.of(left, chunk):
            if chunk.hop == 0:
                values, numbers = diagonal(tile, own, chunk.rows)
                pairs[numbers] = values
            _add(tile, own, chunk, rows, block, tiles, bounded=bounded)
        if block is not None and behind is not None and chunk.last:
            behind.fold(block)
    return _Sums(rows=rows.values, columns=None if behind is None else behind.home(), pairs=pairs)


def _add(
    tile: Tensor, own: slice, chunk: Chunk, rows: LogSums, columns: LogSums | None, tiles: Tiles, *, bounded: bool
) -> None:
    """A tile to the sums of its rows and columns; it is overwritten."""
    if bounded:
        tile.exp_()
        rows.add_exponentials(own, tile, 1)
        if columns is not None:
            columns.add_exponentials(chunk.rows, tile, 0)
        return
    rows.add(own, tile, 1, tile if columns is None else tiles.room(tile))
    if columns is not None:
        columns.add(chunk.rows, tile, 0, tile)


def _second_sweep(
    left: Tensor, right: Tensor, ring: Ring, tiles: Tiles, sums: _Sums, *, bounded: bool, right_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients without the factors that all derivatives have."""
    sides = (sums.rows,) if sums.columns is None else (sums.rows, sums.columns)
    rows, *notes = sides if bounded else [part_(side) for side in sides]
    grad_left = torch.zeros_like(left)
    behind = Homeward(ring, left.new_zeros(ring.most, left.shape[1])) if right_grad else None
    ways = 1 + len(notes)
    for chunk in ring.chunks(right, notes):
        columns = chunk.notes[0] if notes else None
        grad_right = None
        for own, tile in tiles.of(left, chunk):
            _differentiate(tile, rows[own], columns, tiles, bounded=bounded)
            if chunk.hop == 0:
                diagonal(tile, own, chunk.rows)[0].sub_(ways)
            grad_left[own].addmm_(tile, chunk.values)
            if behind is not None:
                grad_right = behind.take(chunk.span) if grad_right is None else grad_right
                grad_right[: tile.shape[1]].addmm_(tile.t(), left[own])
        if behind is not None:
            if grad_right is None:
                behind.take(chunk.span)
            behind.pass_on(chunk.span)
    return grad_left, None if behind is None else behind.home()


def _differentiate(tile: Tensor, rows: Tensor, columns: Tensor | None, tiles: Tiles, *, bounded: bool) -> None:
    """exp(s - row) + exp(s - column), in place: [r, c]. Of rows [r, 2] and columns [c, 2] the parts of the log of the
    sum, or, bounded, the sum."""
    if bounded:
        by_row = rows[:, 1:].reciprocal()
        tile.exp_()
        tile.mul_(by_row if columns is None else torch.add(by_row, columns[:, 1].reciprocal(), out=tiles.room(tile)))
        return
    other = None if columns is None else log_shares(tile, columns, 0, tiles.room(tile)).exp_()
    log_shares(tile, rows, 1, tile).exp_()
    if other is not None:
        tile.add_(other)
