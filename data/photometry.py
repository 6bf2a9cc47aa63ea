"""Random changes of pixels where they are: brightness, contrast, colours, blur, noise, as SimCLR has them (Chen et al.,
2020).

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
from data.keyed import Purpose, keyed_uniforms

_LUMA = 0.299, 0.587, 0.114  # of red, green and blue: how bright they are (ITU-R BT.601)
_REACH = 3  # standard deviations that a blur reaches to either side


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """What is done to the pixels of each image of a micro-batch, in this order.

    Attributes:
        brightness: [B], they are multiplied by it. contrast: [B], so is their distance from the image's mean.
        saturation: [B], so is their distance from the grey that is as bright. hue: [B], they are turned by it, of a
            whole circle. grey: [B], whether they become that grey.
        blur: [B], standard deviation in pixels. noise: [B], standard deviation. key: seed, variant and first draw.
    """

    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    grey: NDArray[np.bool_]
    blur: NDArray[np.float64]
    noise: NDArray[np.float64]
    key: tuple[int, int, int]


def apply_photometry(images: Tensor, p: Photometry, config: DataConfig) -> Tensor:
    """The [B, C, H, W] images in 0..1, changed, and cut off at 0 and 1."""
    if config.brightness:
        images = images * _column(p.brightness)
    if config.contrast:
        means = _column(np.array([image.numpy().mean(dtype=np.float64) for image in images]))
        images = (images - means) * _column(p.contrast) + means
    if config.saturation or config.grey:
        factors = _column(np.where(p.grey, 0, p.saturation))
        grey = sum(weight * images[:, n : n + 1] for n, weight in enumerate(_LUMA))
        images = grey + (images - grey) * factors
    if config.hue:
        images = _turned(images, _column(6 * p.hue))
    if config.blur:
        weights = _filters(p.blur, math.ceil(_REACH * config.blur))
        images = _filtered(_filtered(images, weights, dim=-1), weights, dim=-2)
    if config.noise:
        images = images + _normal(p.key, images) * _column(p.noise)
    return images.clamp(0, 1)


def _turned(images: Tensor, sixths: Tensor) -> Tensor:
    """The [B, 3, H, W] images with their hues turned by [B, 1, 1, 1] sixths of the circle (Smith, 1978: HSV)."""
    images = images.clamp(0, 1)
    red, green, blue = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    span = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red, (green - blue) / span,
        torch.where(value == green, (blue - red) / span + 2, (red - green) / span + 4),
    )  # fmt: skip
    places = hue + sixths + torch.tensor([5.0, 3.0, 1.0])[:, None, None]  # [B, 3, H, W]: of each channel on the circle
    places = places - 6 * (places / 6).floor()
    return value - chroma * torch.minimum(places, 4 - places).clamp(0, 1)


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


def _normal(key: tuple[int, int, int], images: Tensor) -> Tensor:
    """Normally distributed numbers, one for each pixel (Box and Muller, 1958)."""
    seed, variant, first_draw = key
    half = math.ceil(images[0].numel() / 2)
    uniforms = keyed_uniforms(seed, Purpose.NOISE, first_draw, len(images), width=2 * half, variant=variant)
    result = np.empty((len(images), 2 * half), dtype=np.float32)
    for row, drawn in zip(result, uniforms.astype(np.float64), strict=True):
        radius, angle = np.sqrt(-2 * np.log1p(-drawn[:half])), 2 * np.pi * drawn[half:]
        row[:half], row[half:] = radius * np.cos(angle), radius * np.sin(angle)
    return torch.from_numpy(result[:, : images[0].numel()]).reshape(images.shape)
