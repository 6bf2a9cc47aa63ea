"""A micro-batch of images of several sizes, made of a data set by its configuration: as data.making, image by image.

Shapes: B images, C channels, r P x c P pixels of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import Augmentation, augment, draw_augmentation
from data.config import DataConfig
from data.datasets import Dataset
from data.decode import CENTRE
from data.erasing import erase
from data.keyed import Variant
from data.normalise import Normalise
from data.reading import Content
from data.resolution import Map, whole_of

HELD_OUT_SEED = 0  # every run sees the same
_NOTHING = (1, 1)  # the map of an image that is not there


class _Wanted(NamedTuple):
    """An image by its number, its rows and columns of pixels as it is stored and of patches as it is wanted, and what
    is done to it."""

    number: int
    sides: Sequence[int]
    shape: Map
    augmentation: Augmentation | None


class PackedMaker:
    """Makes what a rank needs. All need the maps, which say whose the tokens are: where no images are wanted, headers
    of files are all that is read.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, with_images: bool) -> None:
        assert dataset.resolution is not None
        self._dataset, self._config, self._resolution = dataset, config, dataset.resolution
        self._with_images = with_images
        self._normalise = Normalise(config, channels=dataset.image_shape[0])

    def training(self, indices: NDArray[np.int64], seed: int, first_draw: int) -> Content:
        """Of images at `indices`, which are drawn one after the other from `first_draw` on."""
        sides = self._dataset.sides(indices)
        maps = self._resolution.training(sides, seed, first_draw)
        drawn = (draw_augmentation(self._config, seed, first_draw + n, 1) for n in range(len(indices)))
        return self._content([*map(_Wanted, indices.tolist(), sides.tolist(), maps, drawn)])

    def held_out(self, indices: NDArray[np.int64], missing: int, are_there: NDArray[np.bool_] | None = None) -> Content:
        """Of the images at `indices`, and `missing` ones of one black patch; the same in place of those that are not
        there (None: all are)."""
        kept = indices if are_there is None else indices[are_there]
        sides = self._dataset.sides(kept)
        found = {
            index: _Wanted(index, own, shape, self._held_out_augmentation(index))
            for index, own, shape in zip(kept.tolist(), sides.tolist(), self._resolution.held_out(sides), strict=True)
        }
        return self._content([found.get(index) for index in indices.tolist()] + [None] * missing)

    def _held_out_augmentation(self, index: int) -> Augmentation | None:
        if not self._config.vary_held_out:
            return None
        return draw_augmentation(self._config, HELD_OUT_SEED, index, 1, Variant.HELD_OUT)

    def _content(self, rows: Sequence[_Wanted | None]) -> Content:
        """None: an image that is not there."""
        maps = tuple(_NOTHING if row is None else row.shape for row in rows)
        if not self._with_images:
            return Content(maps=maps)
        black = torch.zeros(self._dataset.image_shape[0], self._resolution.patch, self._resolution.patch)
        images = [black if row is None else self._image(row) for row in rows]
        return Content(self._resolution.pack(images, len(rows)), maps=maps)

    def _image(self, wanted: _Wanted) -> Tensor:
        """[C, r P, c P], normalised."""
        augmentation, (rows, cols), patch = wanted.augmentation, wanted.shape, self._resolution.patch
        crop = CENTRE if augmentation is None or not self._config.crops else augmentation.crop[0]
        size = (self._dataset.image_shape[0], rows * patch, cols * patch)
        pixels = self._dataset.read_sized(wanted.number, whole_of(crop, wanted.sides, wanted.shape), size)
        image = torch.from_numpy(np.ascontiguousarray(pixels))[None]
        if augmentation is not None:
            image = augment(image, augmentation, self._config, crop=False)
        image = self._normalise(image)
        if augmentation is not None and self._config.erase:
            erase(image, self._config.erase, self._config.erase_fill, augmentation.photometry.key)
        return image[0]
