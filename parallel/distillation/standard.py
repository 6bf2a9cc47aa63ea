"""Logits of mean 0 and deviation 1, image by image: a student learns how its teachers rank and space the classes, and
not how large their logits are, which differs from teacher to teacher (Sun et al. 2024, logit standardisation).

Legend: B images, C classes, T tensor ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.context import sum_over

_LEAST = 1e-12  # of a variance


def standard_logits(logits: Tensor, classes: int, axis: Axis) -> Tensor:
    """Over all classes of an image. Two numbers of an image travel, one after the other.

    Args:
        logits: [B, C/T], this rank's classes. classes: C. axis: the tensor axis, on which all go on to compute the same
            loss of what comes out.

    Returns:
        [B, C/T], of fp32 at least, differentiable.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = logits - sum_over(logits.sum(1, keepdim=True), axis) / classes
    variance = sum_over(centred.square().sum(1, keepdim=True), axis) / classes
    return centred * variance.clamp(min=_LEAST).rsqrt()
