"""How images of a batch lie to each other, a student's beside a teacher's (Park et al. 2019, relational knowledge
distillation): distances of pairs, angles of triplets, by Huber's loss.

Both are of the whole batch, all images of all ranks: they are sums over pairs and triplets, and those of a micro-batch
alone would be another loss in each layout. So they are joint losses (`engine/objectives`): a rank gives its embeddings
of all micro-batches of a step. What is gathered is N x E.

Legend: n images of this rank, N of all, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis

ROWS_AT_ONCE = 256
"""Of distances that are made."""
_LEAST = 1e-12


def distance_difference(x: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
    """Of all pairs' distances, each over their mean: a mean over N (N - 1) pairs. Collective.

    Args:
        x, teacher: [n, E], [n, E'], n the same on all ranks. axis: the ranks, all of which must differentiate it, by
            the same factor.

    Returns:
        [], this rank's share, of fp32 at least: the sum over ranks is the whole.

    Raises:
        ValueError: numbers of rows differ, or N is below 2.
    """
    return _joint(x, teacher, axis, _distances, 2)


def angle_difference(x: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
    """Of the cosines of all triplets' angles: a mean over N (N - 1) (N - 2). Collective.

    Each rank takes the triplets whose vertex is its own; that is 4 n N N E products. Arguments, result and errors as
    `distance_difference`, but N is at least 3.
    """
    return _joint(x, teacher, axis, _angles, 3)


Joint = Callable[[Tensor, Tensor, int, int, Axis], tuple[Tensor, Tensor]]
"""All rows of both, the first and the end of this rank's -> (its share, the gradient of its rows)."""


def _joint(x: Tensor, teacher: Tensor, axis: Axis, run: Joint, least: int) -> Tensor:
    if x.dim() != 2 or teacher.dim() != 2 or x.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"embeddings are {list(x.shape)} and {list(teacher.shape)}: give [images, width] of the same images"
        )
    if x.shape[0] * axis.size < least:
        raise ValueError(
            f"{x.shape[0] * axis.size} image(s) have no {'pair' if least == 2 else 'triplet'}: give a batch of at "
            f"least {least}"
        )
    loss: Tensor = _Joint.apply(x, teacher.detach(), axis, run)
    return loss


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, teacher: Tensor, axis: Axis, run: Joint) -> Tensor:
        both = [comm.all_gather_rows(of.to(torch.promote_types(of.dtype, torch.float32)), axis) for of in (x, teacher)]
        first = x.shape[0] * axis.index
        loss, grad = run(both[0], both[1], first, first + x.shape[0], axis)
        ctx.save_for_backward(grad)
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(ctx.dtype), None, None, None


def _huber(difference: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum, the derivatives, in place)."""
    slope = difference.clamp(-1, 1)
    return (slope * difference.sub_(slope, alpha=0.5)).sum(), slope


def _far(x: Tensor, first: int, end: int) -> Tensor:
    """Distances of some rows from all. Not by products, whose digits cancel where rows are near."""
    return torch.cdist(x[first:end], x, compute_mode="donot_use_mm_for_euclid_dist")


def _distances(x: Tensor, teacher: Tensor, first: int, end: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """A pair's derivative is the same from both its ends, so a rank needs nothing of others but sums."""
    pairs = x.shape[0] * (x.shape[0] - 1)
    parts = [(start, min(start + ROWS_AT_ONCE, end)) for start in range(first, end, ROWS_AT_ONCE)]
    sums = [torch.stack([_far(of, *part).sum() for part in parts]).sum() for of in (x, teacher)]
    means = (comm.all_reduce(torch.stack(sums), axis) / pairs).clamp(min=_LEAST)
    loss, pull = x.new_zeros(()), x.new_zeros(())
    for part in parts:
        own = _far(x, *part) / means[0]
        share, slope = _huber(own - _far(teacher, *part) / means[1])
        loss, pull = loss + share, pull + (slope * own).sum()
    pull = comm.all_reduce(pull.clone(), axis) / pairs  # the mean distance gives way, too
    grad = x.new_empty(end - first, x.shape[1])
    for start, stop in parts:
        own = _far(x, start, stop)
        slope = _huber(own / means[0] - _far(teacher, start, stop) / means[1])[1] - pull
        slope = torch.where(own > 0, slope / own.clamp(min=_LEAST), 0)
        grad[start - first : stop - first] = slope.sum(1, keepdim=True) * x[start:stop] - slope @ x
    return loss / pairs, grad * (2 / (pairs * means[0]))


def _angles(x: Tensor, teacher: Tensor, first: int, end: int, axis: Axis) -> tuple[Tensor, Tensor]:
    triplets = x.shape[0] * (x.shape[0] - 1) * (x.shape[0] - 2)
    loss, grad = x.new_zeros(()), torch.zeros_like(x)
    for vertex in range(first, end):
        (ways, lengths), (theirs, _) = _ways(x, vertex), _ways(teacher, vertex)
        share, slope = _huber(ways @ ways.t() - theirs @ theirs.t())
        loss = loss + share
        back = slope @ ways  # half of it: slope is symmetric
        back = torch.where(lengths > _LEAST, (back - ways * (back * ways).sum(1, keepdim=True)) / lengths, 0)
        grad += back
        grad[vertex] -= back.sum(0)
    return loss / triplets, comm.reduce_scatter_rows(grad * (2 / triplets), axis)


def _ways(x: Tensor, vertex: int) -> tuple[Tensor, Tensor]:
    """Directions [N, E] from one row to all, 0 to itself, and their lengths [N, 1]."""
    ways = x - x[vertex]
    lengths = torch.linalg.vector_norm(ways, dim=1, keepdim=True).clamp(min=_LEAST)
    return ways / lengths, lengths
