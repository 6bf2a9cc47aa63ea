"""Crops of the photographs that ship with scikit-image: which photograph is it? Nothing is ever downloaded.

A photograph is a class. Its right quarter is held out: crops are cut from one side or the other, so that no pixel is
both trained on and tested with. Every crop is brought to one mean and one contrast per channel, since brightness and
colour alone would tell many of the photographs apart. What is left is texture, at the photograph's full resolution.

Shapes: N crops in the set, B in a micro-batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.datasets import Dataset, installed_folder
from data.errors import UnreadableImageError
from data.keyed import Purpose, keyed_uniforms
from data.scaling import Finish

if TYPE_CHECKING:
    from PIL.Image import Image

# What is used of each photograph: left, top, right, bottom; None: all of it. Around the retina there is a black frame.
# Left out are those whose right quarter shows something else than the rest (astronaut, camera, cell, chelsea, coffee),
# and what is no photograph, or too small or too blurred to have a texture.
_PHOTOGRAPHS: dict[str, tuple[int, int, int, int] | None] = {
    "brick.png": None,
    "coins.png": None,
    "grass.png": None,
    "gravel.png": None,
    "hubble_deep_field.jpg": None,
    "ihc.png": None,
    "moon.png": None,
    "motorcycle_left.png": None,
    "page.png": None,
    "retina.jpg": (225, 225, 1185, 1185),
    "rocket.jpg": None,
    "text.png": None,
}
NUM_CLASSES = len(_PHOTOGRAPHS)

_HELD_OUT_CROPS = 16  # of each photograph
_LARGEST_ZOOM = 4  # small photographs are enlarged up to this much, so that their right quarter holds a crop
_CONTRAST = 1 / 6  # standard deviation of a crop's pixels: all within three of them of the mean fit into 0..1
_LEAST_CONTRAST = 2 / 255  # crops with less are not brought to full contrast, which would show rounding alone


@dataclass(frozen=True, kw_only=True)
class Region:
    """The part of a photograph that crops are cut from: left, top, right, bottom, in its pixels."""

    file: Path
    box: tuple[int, int, int, int]
    zoom: float
    """Pixels of a crop per pixel of the photograph, 1 or more; the same on both sides of the photograph."""

    @property
    def size(self) -> tuple[int, int]:
        """Height, width, in pixels of the photograph."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    def room(self, crop_shape: tuple[int, int]) -> tuple[int, int]:
        """The pixels that a crop of H x W can move down and across."""
        down, across = (math.floor(s - c / self.zoom) for s, c in zip(self.size, crop_shape, strict=True))
        return down, across

    def decode(self, mode: str) -> Image:
        """The region's pixels alone: a resampling filter cannot reach over its edges."""
        from PIL import Image

        try:
            with Image.open(self.file) as photograph:
                return photograph.convert(mode).crop(self.box)
        except Exception as error:  # decoders raise many types: OSError, SyntaxError, struct.error, ...
            raise UnreadableImageError(f"{self.file} cannot be decoded ({error}): install scikit-image anew") from error


class TextureCrops(Dataset):
    """Crops at given places: crop i is cut from region i mod K, `places[i]` pixels [down, across] from its corner."""

    crops_when_read = False
    tells_sides = True

    def __init__(self, regions: list[Region], places: NDArray[np.int64], image_shape: tuple[int, int, int]) -> None:
        self.regions = regions
        self.places = places  # [N, 2]
        self.labels = np.arange(len(places)) % len(regions)
        self.num_classes = len(regions)
        self.class_names = tuple(region.file.stem for region in regions)
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        assert crop is None and finish is None, "random crops of crops are part of the one resampling"
        images = np.empty((len(indices), *self.image_shape), dtype=np.float32)
        for row, index in enumerate(indices):
            images[row] = self._cut(index)
        return torch.from_numpy(images)

    @cached_property
    def _pixels(self) -> list[Image]:
        """Decoded at first use: most pipeline stages never look at an image."""
        mode = "L" if self.image_shape[0] == 1 else "RGB"
        return [region.decode(mode) for region in self.regions]

    def _cut(self, index: int) -> NDArray[np.float32]:
        from PIL.Image import Resampling

        channels, height, width = self.image_shape
        label = self.labels[index]
        region, pixels = self.regions[label], self._pixels[label]
        top, left = self.places[index].tolist()
        right, bottom = left + width / region.zoom, top + height / region.zoom
        box = (left, top, min(right, pixels.width), min(bottom, pixels.height))  # rounding
        crop = np.asarray(pixels.resize((width, height), Resampling.BICUBIC, box=box), dtype=np.float32)
        return standardise(crop.reshape(height, width, channels).transpose(2, 0, 1) / np.float32(255))


def standardise(crop: NDArray[np.float32]) -> NDArray[np.float32]:
    """A crop [C, H, W] with mean 1/2 and standard deviation 1/6 in each channel, cut off at 0 and 1."""
    mean, deviation = crop.mean((1, 2), keepdims=True), crop.std((1, 2), keepdims=True)
    scale = _CONTRAST / np.maximum(deviation, _LEAST_CONTRAST)
    return np.clip((crop - mean) * scale + 0.5, 0, 1, dtype=np.float32)


def photographs() -> list[Path]:
    """The files, which come with scikit-image. Raises ValueError where it is missing."""
    folder = installed_folder("skimage", "data", kind="textures", package="scikit-image")
    return [folder / name for name in _PHOTOGRAPHS]


def textures(image_shape: tuple[int, int, int], crops: int, seed: int) -> tuple[TextureCrops, TextureCrops]:
    """Of each photograph, `crops` random crops to train on, and 16 crops of its right quarter, on a raster, held out.

    Crop i of the training set depends on (seed, i) alone; the crops held out are the same for every seed. A photograph
    whose right quarter is smaller than a crop is enlarged until it fits, up to 4 times.

    Raises:
        ValueError: for images neither grey nor RGB, for those too large to be cut, and if scikit-image is missing.
    """
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise ValueError(f"model.in_channels is {channels}: textures are read with 1 channel (grey) or 3 (RGB)")
    parts = zip(photographs(), _PHOTOGRAPHS.values(), strict=True)
    halves = [_split(file, used, (height, width)) for file, used in parts]
    train, held_out = ([pair[side] for pair in halves] for side in (0, 1))
    _check_fits(held_out, (height, width))
    return (
        TextureCrops(train, _random_places(train, (height, width), crops, seed), image_shape),
        TextureCrops(held_out, _raster(held_out, (height, width)), image_shape),
    )


def _split(file: Path, used: tuple[int, int, int, int] | None, crop_shape: tuple[int, int]) -> tuple[Region, Region]:
    """Left three quarters, right quarter. Reads no more than the size of the photograph."""
    from PIL import Image

    if not file.is_file():
        raise ValueError(f"data.kind textures needs {file}, which is missing: install the pinned scikit-image anew")
    with Image.open(file) as photograph:
        left, top, right, bottom = used or (0, 0, *photograph.size)
    cut = right - (right - left) // 4
    zoom = max(1.0, crop_shape[0] / (bottom - top), crop_shape[1] / (right - cut))
    train = Region(file=file, box=(left, top, cut, bottom), zoom=zoom)
    return train, Region(file=file, box=(cut, top, right, bottom), zoom=zoom)


def _check_fits(held_out: list[Region], crop_shape: tuple[int, int]) -> None:
    if max(region.zoom for region in held_out) > _LARGEST_ZOOM:
        smallest = min(held_out, key=lambda region: min(region.size))
        raise ValueError(
            f"model.image_size is {crop_shape[0]} x {crop_shape[1]}, but only {smallest.size[0]} x {smallest.size[1]} "
            f"pixels of {smallest.file.name} are held out, enlarged {_LARGEST_ZOOM} times at most: set "
            f"model.image_size to {_LARGEST_ZOOM * min(smallest.size)} or less"
        )


def _random_places(regions: list[Region], crop_shape: tuple[int, int], crops: int, seed: int) -> NDArray[np.int64]:
    """[crops * K, 2]: places all over the regions, in turn."""
    count = crops * len(regions)
    uniforms = keyed_uniforms(seed, Purpose.TEXTURE_PLACES, 0, count, width=2).astype(np.float64)
    room = np.array([region.room(crop_shape) for region in regions])
    return (uniforms * (np.tile(room, (crops, 1)) + 1)).astype(np.int64)


def _raster(regions: list[Region], crop_shape: tuple[int, int]) -> NDArray[np.int64]:
    """[16 * K, 2]: the places of a raster over each region, the regions in turn."""
    rasters = [_places_apart(*region.room(crop_shape)) for region in regions]
    return np.stack(rasters, axis=1).reshape(-1, 2)


def _places_apart(down: int, across: int) -> NDArray[np.int64]:
    """[16, 2]: of the rasters of 16 places in down x across pixels, the one whose places are farthest apart."""

    def distance(rows: int) -> float:
        room = ((down, rows), (across, _HELD_OUT_CROPS // rows))
        return min(pixels / (places - 1) for pixels, places in room if places > 1)

    rows = max((r for r in range(1, _HELD_OUT_CROPS + 1) if _HELD_OUT_CROPS % r == 0), key=distance)
    places = np.meshgrid(
        np.linspace(0, down, rows).astype(np.int64),
        np.linspace(0, across, _HELD_OUT_CROPS // rows).astype(np.int64),
        indexing="ij",
    )
    return np.stack(places, axis=-1).reshape(-1, 2)
