"""Samples of a few classes, and a rank's share of them."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.evaluation.rows import Rows
from parallel.comm import Axis
from parallel.layout import split_range

CLASSES, WIDTH, TRAIN, TEST = 4, 6, 90, 43


def blobs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test features and labels of classes that overlap; some samples twice, under other labels too."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.arange(TRAIN + TEST) % CLASSES
    values = centres[labels] + 0.9 * torch.randn(TRAIN + TEST, WIDTH, generator=generator) + 3.0
    values[20:26] = values[60:66]
    return values[:TRAIN], labels[:TRAIN], values[TRAIN:], labels[TRAIN:]


def share(values: Tensor, axis: Axis) -> Rows:
    return Rows(values[slice(*split_range(len(values), axis.size, axis.index))].clone(), len(values), axis)
