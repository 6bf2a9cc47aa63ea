"""Affinity mimicking: whom each image is like among all texts, and each text among all images, as a teacher has it.

Wu et al. 2023, TinyCLIP. With q the softmax of the teacher's logits along rows or columns, p that of the student's,

    loss = 1/2N sum_i KL(q_i. | p_i.) + 1/2N sum_j KL(q_.j | p_.j),  dloss/ds = (p_row - q_row + p_col - q_col) / 2N,

over the pairs of all ranks, in blocks that are made twice, as in `softmax`: of the student and of the teacher the first
sweep adds up rows and columns, the second makes of both blocks the loss and the derivative. The rows of both go round
side by side. So nothing of N x N is kept, and the loss hangs on no layout.

Legend: n rows of this rank, N of all ranks, E width of the student's embeddings, E' of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.contrastive.logsums import log_shares, part_
from parallel.contrastive.pairs import Gradients, agree
from parallel.contrastive.ring import Homeward, Ring
from parallel.contrastive.softmax import pair_sums
from parallel.contrastive.tiles import ROWS, Tiles, dot_of_rows


@torch.no_grad()
def affinity(
    left: Tensor, right: Tensor, scale: Tensor, taught: tuple[Tensor, Tensor], axis: Axis, *, block: int = ROWS
) -> Gradients:
    """What the distributions of both directions differ by, and its gradients; the bias has none. Collective.

    Args:
        left, right: of the student, [n, E], row i of both a pair; n may differ among ranks. scale: [], 1 / temperature,
            the same on all ranks. taught: the teacher's of the same pairs, [n, E'], the left one times his own scale.
            axis: the ranks. block: the most rows and columns of a block of logits.

    Raises:
        ValueError: shapes or types do not fit; no rank has a pair.
    """
    sizes, theirs = agree(left, right, scale, axis), agree(*taught, torch.ones_like(scale), axis)
    if sizes.left != theirs.left:
        raise ValueError(
            f"ranks have {theirs.left} pairs of the teacher and {sizes.left} of the student: give the same"
        )
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right, *taught_rows = (x.detach().to(wide).contiguous() for x in (left, right, *taught))
    width, moving = left.shape[1], torch.cat([right, taught_rows[1]], 1)
    ring, weight = Ring(axis, sizes.right, block), 1 / sum(sizes.left) / 2
    columns = ring.spans(min(width, moving.shape[1] - width), moving.itemsize)[0].stop
    own = Tiles(left, block, columns, scale), Tiles(taught_rows[0], block, columns, torch.ones_like(scale))
    sums = [
        pair_sums(a, b, ring, tiles)
        for a, b, tiles in ((left, right, own[0]), (taught_rows[0], taught_rows[1], own[1]))
    ]
    rows, notes = ([part_(side) for side in sides] for sides in zip(*sums, strict=True))
    loss, grad_left = left.new_zeros((), dtype=torch.float64), torch.zeros_like(left)
    behind = Homeward(ring, left.new_zeros(ring.most, width))
    for chunk in ring.chunks(moving, notes):
        grad_right = behind.take(chunk.span)[: len(chunk.values)]
        parts = [replace(chunk, values=of) for of in (chunk.values[:, :width], chunk.values[:, width:])]
        both = zip(own[0].of(left, parts[0]), own[1].of(taught_rows[0], parts[1]), strict=True)
        for (at, tile), (_, asked) in both:
            found, derivative = _difference(tile, asked, [of[at] for of in rows], chunk.notes)
            loss += found
            grad_left[at].addmm_(derivative, parts[0].values)
            grad_right.addmm_(derivative.t(), left[at])
        behind.pass_on(chunk.span)
    by_scale, factor = dot_of_rows(left, grad_left) * weight, scale.detach().to(wide).reshape(()) * weight
    return Gradients(
        loss=(loss * weight).to(wide),
        left=grad_left.mul_(factor),
        right=behind.home().mul_(factor),
        scale=by_scale.to(wide),
    )


def _difference(
    tile: Tensor, asked: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Of a block of logits [r, c] and the teacher's: its part of both divergences, [] in fp64, and the derivative by
    the logits, [r, c]; both without the factors that all blocks have.

    Args:
        rows, columns: of the student's and the teacher's series the log of the sum in two parts, [r, 2] and [c, 2].
    """
    loss, derivative = tile.new_zeros((), dtype=torch.float64), torch.zeros_like(tile)
    for dim, (own, theirs) in ((1, rows), (0, columns)):
        log_p = log_shares(tile, own, dim, torch.empty_like(tile))
        log_q = log_shares(asked, theirs, dim, torch.empty_like(tile))
        q = log_q.exp()
        loss += (q * log_q.sub_(log_p)).sum(dtype=torch.float64)
        derivative.add_(log_p.exp_()).sub_(q)
    return loss, derivative
