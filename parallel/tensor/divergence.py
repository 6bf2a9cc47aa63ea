"""Divergences between logits whose classes are split over the tensor axis; logits are never gathered.

Legend: B images, C classes, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis
from parallel.tensor.loss import sum_over


class _Divergence(torch.autograd.Function):
    """Of the targets from the logits, whose gradient is the difference of the two distributions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, temperature: float) -> Tensor:
        log_p, log_q = _log_softmax(torch.stack([logits.float(), targets.float()]) / temperature, axis)
        q = log_q.exp()
        ctx.save_for_backward((log_p.exp() - q) * temperature)
        ctx.dtype = logits.dtype
        return comm.all_reduce((q * (log_q - log_p)).sum(1), axis) * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(ctx.dtype), None, None, None


def _log_softmax(logits: Tensor, axis: Axis) -> Tensor:
    """Over the classes of all ranks, of both at once: fp32 [2, B, C/T] -> [2, B, C/T]."""
    shifted = logits - comm.all_reduce(logits.amax(2), axis, "max")[..., None]
    return shifted - comm.all_reduce(shifted.exp().sum(2), axis).log()[..., None]


def softened_divergence(logits: Tensor, targets: Tensor, axis: Axis, temperature: float) -> Tensor:
    """KL divergence of each image's softened classes from those of a teacher, in nats, times the square of the
    temperature, so that gradients keep their size (Hinton et al. 2015).

    Args:
        logits, targets: [B, C/T], this rank's classes; nothing goes backward to the targets. axis: the tensor axis.
            temperature: both are divided by it.

    Returns:
        fp32 [B], the same on every rank.
    """
    loss: Tensor = _Divergence.apply(logits, targets.detach(), axis, temperature)
    return loss


def sigmoid_divergence(logits: Tensor, targets: Tensor, axis: Axis, temperature: float) -> Tensor:
    """The same with each class by itself, yes or no: the sum over classes of the divergences of two outcomes."""
    z, u = (x.float() / temperature for x in (logits, targets.detach()))
    q = u.sigmoid()
    each = F.softplus(z) - q * z - (F.softplus(u) - q * u)
    return sum_over(each.sum(1), axis) * temperature**2
