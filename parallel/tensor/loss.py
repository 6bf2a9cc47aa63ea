"""Classification losses on logits whose classes are split over the tensor axis; logits are never gathered.

Each rank holds [B, C/T] logits of consecutive classes; what travels is a few numbers per image. The softmax form is
that of Megatron-LM's vocabulary-parallel cross entropy; the sigmoid form is the one ViT-22B was trained with (Beyer et
al. 2020, "Are we done with ImageNet?"): the sum over classes of binary cross-entropies.

Legend: B images, C classes, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis
from parallel.layout import split_range


def own_classes(labels: Tensor, classes: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """(index of each label among this rank's classes, clamped; whether the label is one of them), both of its shape."""
    start, stop = split_range(classes, axis.size, axis.index)
    mine = (labels >= start) & (labels < stop)
    return (labels - start).clamp(0, stop - start - 1), mine


class _SoftmaxCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, classes: int, axis: Axis) -> Tensor:
        logits = logits.float()
        index, mine = own_classes(labels, classes, axis)
        largest = comm.all_reduce(logits.amax(1), axis, "max")
        exp = (logits - largest[:, None]).exp_()
        target = (logits.gather(1, index[:, None])[:, 0] - largest) * mine
        total, target = comm.all_reduce(torch.stack([exp.sum(1), target]), axis)
        ctx.save_for_backward(exp.div_(total[:, None]), index, mine)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, index, mine = ctx.saved_tensors
        grad = probabilities.clone()
        grad.scatter_add_(1, index[:, None], -mine.to(grad.dtype)[:, None])
        return grad * grads[0][:, None], None, None, None


class _SumOver(torch.autograd.Function):
    """All-reduce whose gradient is the identity: each rank's share of the sum is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return comm.all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def softmax_cross_entropy(logits: Tensor, labels: Tensor, classes: int, axis: Axis) -> Tensor:
    """Cross entropy of each image, in nats.

    Args:
        logits: [B, C/T], this rank's classes. labels: int64 [B], of all C. classes: C. axis: the tensor axis.

    Returns:
        fp32 [B], the same on every rank.
    """
    loss: Tensor = _SoftmaxCrossEntropy.apply(logits, labels, classes, axis)
    return loss


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor, classes: int, axis: Axis) -> Tensor:
    """Sum over classes of the binary cross entropies of each image, in nats. Arguments as `softmax_cross_entropy`."""
    logits = logits.float()
    index, mine = own_classes(labels, classes, axis)
    target = logits.gather(1, index[:, None])[:, 0] * mine
    local = F.softplus(logits).sum(1) - target
    return sum_over(local, axis)


def sum_over(share: Tensor, axis: Axis) -> Tensor:
    """Each rank's share of a loss added up; backward, the gradient of the sum is that of each share."""
    return share if axis.size == 1 else _SumOver.apply(share, axis)


@torch.no_grad()
def top_class(logits: Tensor, classes: int, axis: Axis) -> Tensor:
    """The class with the largest logit (the first of equals) of each image: [B, C/T] -> int64 [B], on every rank."""
    value, index = logits.float().max(1)
    best = comm.all_reduce(value.clone(), axis, "max")
    start, _ = split_range(classes, axis.size, axis.index)
    return comm.all_reduce(torch.where(value == best, index + start, classes), axis, "min")


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
