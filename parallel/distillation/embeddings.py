"""Embeddings of images, a student's beside a teacher's, features split over ranks or not.

Legend: B images, E width, T tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis

_LEAST = 1e-12  # of a square of a length


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
        ctx.dtype = x.dtype
        x, teacher = (of.to(torch.promote_types(of.dtype, torch.float32)) for of in (x, teacher))
        dots, own, theirs = comm.all_reduce(
            torch.stack([(x * teacher).sum(1), x.square().sum(1), teacher.square().sum(1)]), axis
        )
        own, theirs = own.clamp(min=_LEAST), theirs.clamp(min=_LEAST)
        cosine = dots * (own * theirs).rsqrt()
        ctx.save_for_backward(x * (cosine / own)[:, None] - teacher * (own * theirs).rsqrt()[:, None])
        return 1 - cosine

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(ctx.dtype), None, None


def cosine_distance(x: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
    """1 less the cosine of each image's embedding and its teacher's. Three numbers of an image travel.

    Args:
        x, teacher: [B, E/T], the features that this rank holds. axis: over which they are split; of one rank if they
            are not.

    Returns:
        [B], the same on every rank, of fp32 at least; gradients are of this rank's features.
    """
    loss: Tensor = _Cosine.apply(x, teacher.detach(), axis)
    return loss
