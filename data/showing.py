"""How held-out images are brought to the model's size, by the names under which others publish their figures.

`timm`: the shorter side to size / crop_pct, rounded down, by Pillow's bicubic filter, then the centre (torchvision's
Resize and CenterCrop). `big_vision`: `resize_small | central_crop`, the shorter side to size / crop_pct by the mean of
the area that a pixel covers, rounded down to whole levels. `big_vision_resize`: `resize`, all of the image to the size,
whatever its shape, bilinear between the four pixels around, without a filter. All of them decode at full size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.decode import CENTRE, channels_first, decode, whole
from data.scaling import Finish

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.float32]
Name = Literal["timm", "big_vision", "big_vision_resize"]
_USUAL_PART = 0.875  # timm's, and 224 of 256
_ROUNDING = 2.0**-12  # a level that is whole but for the rounding of sums stays what it is


@dataclass(frozen=True)
class Showing:
    """Attributes: name: as above. crop_pct: the part of the shorter side that is seen, where there is a crop."""

    name: Name
    crop_pct: float

    def show(
        self, file: str | BinaryIO, image_shape: tuple[int, int, int], name: Callable[[], str] | None = None
    ) -> Pixels:
        """An image file as evaluation sees it: [C, H, W] in 0..1. Arguments and errors as of data.decode.decode."""
        channels, height, width = image_shape
        image, white = whole(file, "L" if channels == 1 else "RGB", name)
        if self.name == "timm":
            return channels_first(_timm(image, height, width, self.crop_pct), channels) / np.float32(white)
        levels = channels_first(image, channels)
        if self.name == "big_vision":
            levels = _big_vision(levels, height, width, self.crop_pct)
        else:
            levels = bilinear(levels, height, width)
        return np.floor(levels + _ROUNDING).astype(np.float32) / np.float32(white)


def showing_of(config: DataConfig) -> Showing | None:
    """That of a configuration; None: the largest centred box, as training's crops are cut."""
    if config.eval_transform == "centre":
        return None
    return Showing(config.eval_transform, config.crop_pct or _USUAL_PART)


def read_file(
    file: str | BinaryIO,
    crop: NDArray[np.float64] | None,
    image_shape: tuple[int, int, int],
    showing: Showing | None,
    name: Callable[[], str] | None = None,
    finish: Finish | None = None,
) -> Pixels:
    """An image file [C, H, W], finished, or in 0..1: a crop of it, or (None) as evaluation sees it. Errors: those of
    decode."""
    if crop is None and showing is not None:
        found = showing.show(file, image_shape, name)
        return found if finish is None else finish(found)
    return decode(file, CENTRE if crop is None else crop, image_shape, name, finish)


def _timm(image: Image, height: int, width: int, crop_pct: float) -> Image:
    from PIL.Image import Resampling

    least_height, least_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if least_height == least_width:  # torchvision's Resize of one number, which rounds the longer side down
        shorter = min(image.size)
        across, down = (least_width * side // shorter for side in image.size)
    else:
        ratio = min(image.height / least_height, image.width / least_width)
        across, down = (round(side / ratio) for side in image.size)
    image = image.resize((across, down), Resampling.BICUBIC) if image.size != (across, down) else image
    top, left = round((down - height) / 2), round((across - width) / 2)  # of two middles the even one
    return image.crop((left, top, left + width, top + height))


def _big_vision(levels: Pixels, height: int, width: int, crop_pct: float) -> Pixels:
    full_height, full_width = levels.shape[1:]
    shorter = max(math.floor(height / crop_pct), math.floor(width / crop_pct))
    factor = np.float32(shorter) / np.float32(min(full_height, full_width))
    down, across = (int(np.round(np.float32(side) * factor)) for side in (full_height, full_width))
    top, left = (down - height) // 2, (across - width) // 2
    seen = _averaged(levels.astype(np.float64), down, slice(top, top + height + 1), axis=1)
    return _averaged(seen, across, slice(left, left + width + 1), axis=2).astype(np.float32)


def _averaged(levels: NDArray[np.float64], size: int, ends: slice, axis: int) -> NDArray[np.float64]:
    """An axis cut into `size` parts of one length: the means of those between `ends`."""
    source = levels.shape[axis]
    places = np.arange(size + 1)[ends] * (source / size)
    pixels = np.minimum(places.astype(np.int64), source - 1)
    sums = np.cumsum(levels, axis) - levels  # of the pixels before each: whole numbers, or nearly
    shape = [-1 if of == axis else 1 for of in range(levels.ndim)]
    parts = (places - pixels).reshape(shape)
    upto = sums.take(pixels, axis) + parts * levels.take(pixels, axis)
    return np.diff(upto, axis=axis) * (size / source)


def bilinear(levels: Pixels, height: int, width: int) -> Pixels:
    """[C, H', W'] -> [C, H, W], as TensorFlow does it without antialiasing."""
    (above, below, down), (before, after, across) = _around(levels.shape[1], height), _around(levels.shape[2], width)
    upper, lower = levels[:, above], levels[:, below]
    upper = upper[..., before] + (upper[..., after] - upper[..., before]) * across
    lower = lower[..., before] + (lower[..., after] - lower[..., before]) * across
    return upper + (lower - upper) * down[:, None]


def _around(source: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Pixels]:
    """Of each pixel's centre: the source's pixels before and after it, and how far it is from the first."""
    places = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(source / size) - np.float32(0.5)
    floors = np.floor(places)
    first = floors.astype(np.int64)
    return first.clip(0, source - 1), (first + 1).clip(0, source - 1), places - floors
