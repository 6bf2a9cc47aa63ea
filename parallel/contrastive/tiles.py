"""Blocks of logits, in memory that is used again and again: what is held of an N x N matrix.

A tile is the product of some rows that stay with some that go round. Rows that go round are multiplied by the scale a
chunk at a time, so no pass over the tiles is spent on it. On one core with AVX2, at a width of 1,024, a tile's product
takes 24 ns for each element, so a pass over it in the caches costs little (0.2 ns, an exponential 1 ns).

Legend: r rows of a tile, c columns, E width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.contrastive.ring import Chunk
from parallel.host_channel import SLOT_BYTES

ROWS = 1024
"""Of a tile, and the most columns of it: 4 MiB in fp32."""


def working_bytes(rows: int, width: int, ranks: int, *, block: int = ROWS, itemsize: int = 4) -> int:
    """The most that a loss over pairs takes beside embeddings and gradients: two tiles, a scaled chunk, the block that
    goes round, and some numbers for each row. Losses by labels take three tiles more; two views are twice the rows.

    Args:
        rows: of this rank. width: of an embedding. ranks: of the axis. block: of the loss. itemsize: bytes of a number.
    """
    columns = max(1, min(block, rows, SLOT_BYTES // (width * itemsize)))
    moving = rows * width if ranks > 1 else 0
    return itemsize * (2 * min(block, rows) * columns + columns * width + moving + 16 * rows)


class Tiles:
    """Memory for a tile, for another, and for a scaled chunk.

    Args:
        like: rows that stay, [n, E]. block: the most rows and columns. scale: [], by which products are multiplied.
    """

    def __init__(self, like: Tensor, block: int, columns: int, scale: Tensor) -> None:
        self.rows = max(1, min(block, like.shape[0]))
        self._scale = scale.detach().to(like.dtype).reshape(())
        self._first = like.new_empty(self.rows * columns)
        self._second: Tensor | None = None
        self._scaled = like.new_empty(columns, like.shape[1])

    def of(self, stay: Tensor, chunk: Chunk) -> Iterator[tuple[slice, Tensor]]:
        """(rows, scale * stay[rows] @ chunk') for all rows that stay: [r, c], good until the next is asked for."""
        count = chunk.values.shape[0]
        if not count:
            return
        scaled = torch.mul(chunk.values, self._scale, out=self._scaled[:count])
        for start in range(0, stay.shape[0], self.rows):
            rows = slice(start, min(start + self.rows, stay.shape[0]))
            tile = self._first[: (rows.stop - start) * count].view(-1, count)
            yield rows, torch.mm(stay[rows], scaled.t(), out=tile)

    def room(self, tile: Tensor) -> Tensor:
        """Another of the same shape, of which there is one."""
        if self._second is None:
            self._second = torch.empty_like(self._first)
        return self._second[: tile.numel()].view_as(tile)


def diagonal(tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, slice]:
    """(the elements of a tile whose row and column have one number, a view; these numbers)."""
    start, stop = max(rows.start, columns.start), min(rows.stop, columns.stop)
    if start >= stop:
        return tile.new_empty(0), slice(start, start)
    part = tile[start - rows.start : stop - rows.start, start - columns.start : stop - columns.start]
    return part.diagonal(), slice(start, stop)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Sum over each row of a * b: [n, E] twice -> [n]. torch's `vecdot` would make a * b first."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


def dot_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all elements of a * b, [] in float64, rows first: [n, E] twice."""
    return row_dots(a, b).sum(dtype=torch.float64)
