"""Every pair as a question of its own: do these two belong together? (Zhai et al. 2023, SigLIP.)

loss = 1/N sum_ij log(1 + exp(-y_ij s_ij)), s = scale left right' + bias, y_ij = 1 where i = j and -1 elsewhere. Its
derivative, ds_ij = (sigmoid(s_ij) - [i = j]) / N, needs nothing of other pairs, so blocks of logits are made once:
three products of n x N x E for each rank.

Legend: n rows of this rank, N of all ranks, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.comm import Axis
from parallel.contrastive.pairs import Gradients, agree
from parallel.contrastive.ring import Chunk, Homeward, Ring
from parallel.contrastive.tiles import ROWS, Tiles, diagonal, dot_of_rows

_SMALL = 1.0
"""Below it -log(1 - sigmoid(s)) has all its digits, and takes less than half the time of torch's softplus."""


@torch.no_grad()
def sigmoid(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, axis: Axis, *, block: int = ROWS) -> Gradients:
    """The sigmoid loss over the pairs of all ranks, and its gradients. Collective.

    Args:
        left, right: [n, E], row i of both a pair; n may differ among ranks. scale, bias: [], the same on all ranks.
        axis: the ranks. block: the most rows and columns of a block of logits.

    Raises:
        ValueError: shapes or types do not fit; no rank has a pair.
    """
    sizes = agree(left, right, scale, axis)
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right = left.detach().to(wide).contiguous(), right.detach().to(wide).contiguous()
    total, ring = sum(sizes.left), Ring(axis, sizes.right, block)
    spans = ring.spans(right.shape[1], right.itemsize)
    tiles = Tiles(left, block, spans[0].stop, scale)
    grad_left = torch.zeros_like(left)
    sums = Homeward(ring, left.new_zeros(ring.most, left.shape[1]))
    kept = _Sums(tiles, bias.detach().to(wide).reshape(()))
    for chunk in ring.chunks(right):
        grad_right = None
        for rows, tile in tiles.of(left, chunk):
            kept.differentiate(tile, rows, chunk)
            grad_left[rows].addmm_(tile, chunk.values)
            grad_right = sums.take(chunk.span) if grad_right is None else grad_right
            grad_right[: tile.shape[1]].addmm_(tile.t(), left[rows])
        if grad_right is None:
            sums.take(chunk.span)
        sums.pass_on(chunk.span)
    by_scale = dot_of_rows(left, grad_left) / total
    factor = scale.detach().to(wide).reshape(()) / total
    return Gradients(
        loss=(kept.loss / total).to(wide),
        left=grad_left.mul_(factor),
        right=sums.home().mul_(factor),
        scale=by_scale.to(wide),
        bias=(kept.bias / total).to(wide),
    )


class _Sums:
    """Turns logits into derivatives in place; adds up the loss, and the derivatives, in float64."""

    def __init__(self, tiles: Tiles, bias: Tensor) -> None:
        self._tiles, self._bias = tiles, bias
        self.loss, self.bias = (torch.zeros((), dtype=torch.float64, device=bias.device) for _ in range(2))

    def differentiate(self, tile: Tensor, rows: slice, chunk: Chunk) -> None:
        tile.add_(self._bias)
        room = self._tiles.room(tile)
        if chunk.hop == 0 and (pairs := diagonal(tile, rows, chunk.rows)[0]).numel():
            # log(1 + exp(-s)) where they belong together, not log(1 + exp(s)) - s, whose digits cancel
            losses, wrong = F.softplus(-pairs), torch.sigmoid(-pairs).neg_()
            torch.ops.aten.softplus.out(tile, out=room)
            diagonal(room, rows, chunk.rows)[0].copy_(losses)
            self._add_losses(room)
            tile.sigmoid_()
            pairs.copy_(wrong)
        elif tile.device.type == "cpu" and bool(tile.amax() <= _SMALL):
            torch.neg(tile.sigmoid_(), out=room).log1p_().neg_()
            self._add_losses(room)
        else:
            self._add_losses(torch.ops.aten.softplus.out(tile, out=room))
            tile.sigmoid_()
        self.bias += tile.sum(1).sum(dtype=torch.float64)

    def _add_losses(self, losses: Tensor) -> None:
        self.loss += losses.sum(1).sum(dtype=torch.float64)
