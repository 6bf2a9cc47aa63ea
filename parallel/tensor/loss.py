"""Classification losses on logits whose classes are split over the tensor axis; logits are never gathered.

Each rank holds [B, C/T] logits of consecutive classes; what travels is a few numbers per image. The softmax form is
that of Megatron-LM's vocabulary-parallel cross entropy; the sigmoid form is the one ViT-22B was trained with (Beyer et
al. 2020, "Are we done with ImageNet?"): the sum over classes of binary cross-entropies.

Legend: B images, C classes, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Softening(NamedTuple):
    """What makes targets of labels soft: probabilities of classes, which add up to 1.

    Attributes:
        others: int64 [B], a second label of each image, where it is a mixture of two; None: none is.
        shares: fp32 [B], of the first label in that; the rest is the second's.
        smoothing: the part of each target that all classes share evenly (Szegedy et al., 2016).
    """

    others: Tensor | None = None
    shares: Tensor | None = None
    smoothing: float = 0.0


HARD = Softening()


class _Targets(NamedTuple):
    """This rank's part. Attributes: places, weights: [B, K] of labels, 0 where those are not of our classes. even: of
    all classes."""

    places: Tensor
    weights: Tensor
    even: float

    @staticmethod
    def of(labels: Tensor, soft: Softening, classes: int, axis: Axis) -> _Targets:
        if soft.others is None or soft.shares is None:
            places, mine = own_classes(labels[:, None], classes, axis)
            weights = mine.float()
        else:
            places, mine = own_classes(torch.stack([labels, soft.others], 1), classes, axis)
            weights = mine * torch.stack([soft.shares, 1 - soft.shares], 1)
        if soft.smoothing:
            weights = weights * (1 - soft.smoothing)
        return _Targets(places, weights, soft.smoothing / classes)

    def dot(self, logits: Tensor) -> Tensor:
        """Logits, fp32 [B, C/T], times their targets, added up: [B]."""
        found = (logits.gather(1, self.places) * self.weights).sum(1)
        return found + self.even * logits.sum(1) if self.even else found


class _SoftmaxCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: _Targets, axis: Axis) -> Tensor:
        logits = logits.float()
        largest = comm.all_reduce(logits.amax(1), axis, "max")
        logits = logits - largest[:, None]
        target = targets.dot(logits)
        exp = logits.exp_()
        total, target = comm.all_reduce(torch.stack([exp.sum(1), target]), axis)
        ctx.save_for_backward(exp.div_(total[:, None]), targets.places, targets.weights)
        ctx.even = targets.even
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probabilities, places, weights = ctx.saved_tensors
        grad = probabilities - ctx.even
        grad.scatter_add_(1, places, -weights)
        return grad * grads[0][:, None], None, None


class _SumOver(torch.autograd.Function):
    """All-reduce whose gradient is the identity: each rank's share of the sum is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return comm.all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def softmax_cross_entropy(logits: Tensor, labels: Tensor, classes: int, axis: Axis, soft: Softening = HARD) -> Tensor:
    """Cross entropy of each image, in nats.

    Args:
        logits: [B, C/T], this rank's classes. labels: int64 [B], of all C. classes: C. axis: the tensor axis.
        soft: what more the targets are.

    Returns:
        fp32 [B], the same on every rank.
    """
    loss: Tensor = _SoftmaxCrossEntropy.apply(logits, _Targets.of(labels, soft, classes, axis), axis)
    return loss


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor, classes: int, axis: Axis, soft: Softening = HARD) -> Tensor:
    """Sum over classes of the binary cross entropies of each image, in nats. Arguments as `softmax_cross_entropy`."""
    logits = logits.float()
    local = F.softplus(logits).sum(1) - _Targets.of(labels, soft, classes, axis).dot(logits)
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
