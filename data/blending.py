"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019): an image and its partner become one, with two labels.

The partner of a draw is another draw, its neighbour: draws are paired as they follow each other (with data.repeats, in
runs of so many, so that an image is not mixed with itself). That is a function of the draw alone, whatever the batch is
and however it lies on ranks; and where a micro-batch is of whole pairs, which most are, no image is read for it. Since
neighbours in the stream are any two images, that is as random as a partner from anywhere in the batch. Each image has a
share and a rectangle of its own (timm's mode `elem`), and both are drawn by (seed, draw).

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.keyed import Purpose, keyed_uniforms


def partners(draws: NDArray[np.int64], repeats: int) -> NDArray[np.int64]:
    """The draw that each is mixed with."""
    return np.where(draws // repeats % 2 == 0, draws + repeats, draws - repeats)


def with_partners(first_draw: int, count: int, repeats: int) -> NDArray[np.int64]:
    """The draws first_draw, ..., first_draw + count - 1 and those around them that are of the same pairs."""
    pair = 2 * repeats
    return np.arange(first_draw // pair * pair, -(-(first_draw + count) // pair) * pair)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How images of a micro-batch are mixed.

    Attributes:
        shares: [B], of an image in what becomes of it; 1: nothing of its partner. boxes: int64 [B, 4], of CutMix what
            is the partner's: top, bottom, left, right; empty where it is Mixup.
    """

    shares: NDArray[np.float32]
    boxes: NDArray[np.int64]


def draw_blend(config: DataConfig, seed: int, first_draw: int, count: int, height: int, width: int) -> Blend:
    """That of the draws first_draw, ..., first_draw + count - 1, of images of height x width pixels."""
    from scipy.special import betaincinv

    uniforms = keyed_uniforms(seed, Purpose.BLEND, first_draw, count, width=5)
    mixed, cut, share, down, across = np.ascontiguousarray(uniforms.T, dtype=np.float64)
    cuts = cut < (config.cutmix_switch if config.mixup and config.cutmix else float(config.cutmix > 0))
    alpha = np.where(cuts, config.cutmix, config.mixup)
    shares = np.where(mixed < config.mix_probability, betaincinv(alpha, alpha, share), 1.0)
    boxes = np.where(cuts[:, None] & (shares < 1)[:, None], _boxes(shares, down, across, height, width), 0)
    top, bottom, left, right = boxes.T
    shares = np.where(cuts, 1 - (bottom - top) * (right - left) / (height * width), shares)
    return Blend(shares=shares.astype(np.float32), boxes=boxes)


def blend(images: Tensor, own: NDArray[np.int64], others: NDArray[np.int64], how: Blend) -> Tensor:
    """Images [B, C, H, W], mixtures of those at `own` with those at `others`, image by image: little is copied."""
    made = images.new_empty(len(own), *images.shape[1:])
    rows = zip(made, own.tolist(), others.tolist(), how.shares.tolist(), how.boxes.tolist(), strict=True)
    for row, mine, theirs, share, (top, bottom, left, right) in rows:
        if share == 1 or bottom > top:
            row.copy_(images[mine])
            row[:, top:bottom, left:right] = images[theirs, :, top:bottom, left:right]
        else:  # products apart: fused with the sum they would be rounded otherwise where a vector ends
            torch.mul(images[mine], share, out=row).add_(images[theirs] * (1 - share))
    return made


def _boxes(
    shares: NDArray[np.float64], down: NDArray[np.float64], across: NDArray[np.float64], height: int, width: int
) -> NDArray[np.int64]:
    """Boxes of the image's shape around any pixel, of 1 - share of its area but for what would lie outside: [B, 4]."""
    ratio, sides = np.sqrt(1 - shares), []
    for place, size in ((down, height), (across, width)):
        extent = (size * ratio).astype(np.int64)
        centre = (place * size).astype(np.int64)
        sides += [(centre - extent // 2).clip(0, size), (centre + (extent + 1) // 2).clip(0, size)]
    return np.stack(sides, axis=-1)
