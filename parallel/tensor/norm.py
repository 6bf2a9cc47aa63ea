"""A norm over features that are split over the tensor axis: statistics of all, on each rank's part.

Legend: R rows, P norms side by side (of queries and of keys), n features on this rank, D on all, T ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis


def norm_over_ranks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    counts: Sequence[int],
    axis: Axis,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """LayerNorm or RMSNorm of each row over the features of all ranks, computed in fp32 at least.

    A rank's mean and sum of squares around it are gathered and put together as Chan et al. 1979 do, so that nothing
    cancels. Two collectives: [R, P, 2] numbers gathered forward, and summed backward.

    Args:
        x: [R, P, n]. weight, bias: [P, n]. counts: n of each rank. rms: without mean.

    Returns:
        [R, P, n] in the dtype of `x`.
    """
    y: Tensor = _NormOverRanks.apply(x, weight, bias, tuple(counts), axis, eps, rms)
    return y


class _NormOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: tuple[int, ...], axis: Axis, eps: float,
        rms: bool,
    ) -> Tensor:  # fmt: skip
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, square = _statistics(wide, counts, axis, rms)
        rstd = torch.rsqrt(square + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.axis, ctx.width, ctx.rms = axis, sum(counts), rms
        y = (wide - mean) * rstd * weight
        return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grads[0].to(rstd.dtype)
        normed = (x.to(rstd.dtype) - mean) * rstd
        scaled = grad * weight
        sums = torch.stack([scaled.sum(-1), (scaled * normed).sum(-1)], -1)
        along_mean, along = (comm.all_reduce(sums, ctx.axis) / ctx.width).unsqueeze(-2).unbind(-1)
        grad_x = scaled - normed * along
        if not ctx.rms:
            grad_x = grad_x - along_mean
        grad_weight = (grad * normed).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return (grad_x * rstd).to(x.dtype), grad_weight, grad_bias, None, None, None, None


def _statistics(x: Tensor, counts: Sequence[int], axis: Axis, rms: bool) -> tuple[Tensor, Tensor]:
    """Mean (0 where there is none) and mean square around it, of all ranks' features: [R, P, 1] each."""
    mean = x.mean(-1, keepdim=True) if not rms else x.new_zeros(*x.shape[:-1], 1)
    own = torch.stack([mean, (x - mean).square().sum(-1, keepdim=True)])  # [2, R, P, 1]
    means, squares = comm.all_gather_rows(own[None], axis).unbind(1)  # [T, R, P, 1] each
    count = torch.tensor(counts, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
    mean = (means * count).sum(0) / sum(counts)
    return mean, (squares + count * (means - mean).square()).sum(0) / sum(counts)
