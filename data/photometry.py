"""Random changes of pixels where they are: brightness, contrast, blur, noise, as SimCLR has them (Chen et al., 2020).

Elementwise, or by NumPy image by image: pixels must not depend on the micro-batch, nor on how many threads there are.
What is done at all goes by the configuration, never by what was drawn. Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.keyed import Purpose, Variant, keyed_uniforms

_REACH = 3  # standard deviations that a blur reaches to either side


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """What is done to the pixels of each image of a micro-batch, in this order.

    Attributes:
        brightness: [B], they are multiplied by it. contrast: [B], so is their distance from the image's mean. blur:
            [B], standard deviation in pixels. noise: [B], standard deviation. key: seed, variant and first draw.
    """

    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    blur: NDArray[np.float64]
    noise: NDArray[np.float64]
    key: tuple[int, Variant, int]


def apply_photometry(images: Tensor, p: Photometry, config: DataConfig) -> Tensor:
    """The [B, C, H, W] images in 0..1, changed, and cut off at 0 and 1."""
    if config.brightness:
        images = images * _column(p.brightness)
    if config.contrast:
        means = _column(np.array([image.numpy().mean(dtype=np.float64) for image in images]))
        images = (images - means) * _column(p.contrast) + means
    if config.blur:
        weights = _filters(p.blur, math.ceil(_REACH * config.blur))
        images = _filtered(_filtered(images, weights, dim=-1), weights, dim=-2)
    if config.noise:
        images = images + _normal(p.key, images) * _column(p.noise)
    return images.clamp(0, 1)


def _column(values: NDArray[np.float64]) -> Tensor:
    """[B] -> float32 [B, 1, 1, 1]."""
    return torch.from_numpy(values.astype(np.float32))[:, None, None, None]


def _filters(deviations: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """[B, 2 reach + 1]: Gaussian weights of the pixels around each."""
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-((offsets / np.maximum(deviations, 1e-3)[:, None]) ** 2) / 2)
    return weights / weights.sum(1, keepdims=True)


def _filtered(images: Tensor, weights: NDArray[np.float64], dim: int) -> Tensor:
    """Each image's pixels weighed along a dimension; beyond its edge it goes on as it ends."""
    places, size = weights.shape[1], images.shape[dim]
    reach = places // 2
    padded = F.pad(images, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="replicate")
    result = torch.zeros_like(images)
    for place in range(places):
        result += padded.narrow(dim, place, size) * _column(weights[:, place])
    return result


def _normal(key: tuple[int, Variant, int], images: Tensor) -> Tensor:
    """Normally distributed numbers, one for each pixel (Box and Muller, 1958)."""
    seed, variant, first_draw = key
    half = math.ceil(images[0].numel() / 2)
    uniforms = keyed_uniforms(seed, Purpose.NOISE, first_draw, len(images), width=2 * half, variant=variant)
    result = np.empty((len(images), 2 * half), dtype=np.float32)
    for row, drawn in zip(result, uniforms.astype(np.float64), strict=True):
        radius, angle = np.sqrt(-2 * np.log1p(-drawn[:half])), 2 * np.pi * drawn[half:]
        row[:half], row[half:] = radius * np.cos(angle), radius * np.sin(angle)
    return torch.from_numpy(result[:, : images[0].numel()]).reshape(images.shape)
