"""Random erasing (Zhong et al., 2020), as timm does it: a rectangle of a normalised image becomes noise or the mean."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.keyed import Purpose, keyed_generator

_AREA = 0.02, 1 / 3  # of the image
_LONGEST = math.log(1 / 0.3)  # logarithm of the largest height / width, or width / height
_TRIES = 10

Fill = Literal["pixel", "rand", "const"]
Key = tuple[int, int, int]
"""Seed, variant and first draw of some images that are drawn one after the other."""


def erase(images: Tensor, probability: float, fill: Fill, key: Key) -> Tensor:
    """Erases a rectangle of some of the normalised images [B, C, H, W], in place; returns them.

    `fill` is what it becomes: normally distributed numbers, one for each pixel and channel (`pixel`) or for each
    channel (`rand`), or 0, the mean (`const`).
    """
    seed, variant, first_draw = key
    for row, image in enumerate(images):
        random = keyed_generator(seed, Purpose.ERASE, first_draw + row, variant)
        box = _box(random, image.shape[1], image.shape[2]) if random.random() <= probability else None
        if box is not None:
            image[:, box[0], box[1]] = _filling(random, image[:, box[0], box[1]], fill)
    return images


def _box(random: np.random.Generator, height: int, width: int) -> tuple[slice, slice] | None:
    """Rows and columns; None where no try gave a rectangle that fits."""
    for _ in range(_TRIES):
        area = random.uniform(*_AREA) * (height * width)
        aspect = math.exp(random.uniform(-_LONGEST, _LONGEST))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if wide < width and high < height:
            top, left = int(random.integers(height - high + 1)), int(random.integers(width - wide + 1))
            return slice(top, top + high), slice(left, left + wide)
    return None


def _filling(random: np.random.Generator, erased: Tensor, fill: Fill) -> Tensor:
    if fill == "const":
        return torch.zeros_like(erased)
    shape = erased.shape if fill == "pixel" else (len(erased), 1, 1)
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32))
