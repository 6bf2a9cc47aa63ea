"""Images at their own aspect ratio, each with a number of patches of its own, such that micro-batches have as many
patches as if all had the model's size (Dehghani et al. 2023, "Patch n' Pack: NaViT").

In training images come in pairs of draws that follow each other. How many patches the first of a pair may have is
drawn, evenly between N - s and N + s; the second may have what is left of 2 N. So, but for a few that whole rows of
patches leave to the second, each number is as likely for either of them, and any even number of images has the same
room, whatever the layout: shapes are static, and no image waits for another batch. The map that is cut into patches has
the image's aspect ratio as nearly as whole patches allow, which needs its height and width, and no pixel. All of it is
integers, and quotients of them: the same on any processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import crop_boxes
from data.config import DataConfig
from data.keyed import Purpose, keyed_uniforms

Map = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """How images become maps of patches.

    Attributes:
        patch: side of a patch, in pixels. patches: N, of an image on average, and of a held-out one at most.
        spread: s, by which the number of a training image's may differ from that.
    """

    patch: int
    patches: int
    spread: int

    @staticmethod
    def of(config: DataConfig, height: int, width: int, patch: int | None) -> Resolution | None:
        """For a model of images of height x width pixels; None: all images have its size.

        Raises:
            ValueError: numbers of patches cannot differ by so little, or nobody has said what a patch is.
        """
        if not config.variable_resolution:
            return None
        if patch is None:
            raise ValueError(
                f"data.variable_resolution is {config.variable_resolution}, but here all images have the model's size: "
                "set it to 0"
            )
        patches = -(-height // patch) * -(-width // patch)
        spread = int(config.variable_resolution * patches)
        if not spread:
            raise ValueError(
                f"data.variable_resolution is {config.variable_resolution}, but {patches} patches differ by less than "
                f"one: use {1 / patches:.3g} or more, or 0"
            )
        return Resolution(patch=patch, patches=patches, spread=spread)

    def training(self, sides: NDArray[np.int64], seed: int, first_draw: int) -> list[Map]:
        """Maps of images of these sides [B, 2], drawn one after the other; B is even."""
        assert len(sides) % 2 == 0, "images come in pairs"
        drawn = keyed_uniforms(seed, Purpose.RESOLUTION, first_draw, len(sides), width=1)[::2, 0].astype(np.float64)
        most = self.patches - self.spread + (drawn * (2 * self.spread + 1)).astype(np.int64)
        maps = list[Map]()
        for first, ((height, width), second) in zip(most.tolist(), sides.reshape(-1, 2, 2).tolist(), strict=True):
            rows, cols = map_of(height, width, first)
            left = min(2 * self.patches - rows * cols, self.patches + self.spread)
            maps += [(rows, cols), map_of(second[0], second[1], left)]
        return maps

    def held_out(self, sides: NDArray[np.int64]) -> list[Map]:
        """Maps of images of these sides [B, 2]."""
        return [map_of(height, width, self.patches) for height, width in sides.tolist()]

    def pack(self, images: Sequence[Tensor], count: int) -> Tensor:
        """The patches of images [C, r P, c P] behind each other, as those of `count` images on average:
        [count * N, C * P * P], each flattened as a convolution kernel is, with zeros at the end."""
        p, first = self.patch, 0
        packed = torch.zeros(count * self.patches, images[0].shape[0] * p * p if images else 0)
        for image in images:
            channels, height, width = image.shape
            tiles = image.view(channels, height // p, p, width // p, p).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
            packed[first : first + len(tiles)] = tiles
            first += len(tiles)
        return packed

    def describe(self) -> str:
        """For the start-up report."""
        least, most = self.patches - self.spread, self.patches + self.spread
        return (
            f"  resolution: each image at its own aspect ratio, {least} to {most} patches of {self.patch} pixels in "
            f"training, up to {self.patches} in evaluation"
        )


def check_pairs(micro_batch_size: int) -> None:
    """Raise ValueError where images cannot come in pairs."""
    if micro_batch_size % 2:
        raise ValueError(
            f"train.micro_batch_size is {micro_batch_size}, and with data.variable_resolution images share their room "
            "in pairs: use an even number"
        )


def map_of(height: int, width: int, most: int) -> Map:
    """(rows, columns) of patches of an image, at most `most` in all: the aspect ratio as near as can be, and few of
    them unused, of which one per cent is as bad as two of the other.
    """
    near = min(most, isqrt(most * height // width))
    best, least = (1, most), float("inf")
    for rows in range(max(1, near - 2), min(most, near + 3) + 1):
        cols = most // rows
        ours, theirs = cols * height, rows * width
        unused = most / (rows * cols)
        cost = max(ours, theirs) / min(ours, theirs) * unused * unused
        if cost < least:
            best, least = (rows, cols), cost
    return best


def whole_of(crop: NDArray[np.float64], sides: Sequence[int], shape: Map) -> NDArray[np.float64]:
    """A crop [4] that means a box of the image's own aspect ratio, for a result of another shape (see
    augment.crop_boxes)."""
    (height, width), (rows, cols) = sides, shape
    return crop * np.array([1, (width / height) / (cols / rows), 1, 1])


def cut(image: NDArray[np.float32], crop: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The box that `crop` [4] cuts out of an image [C, H, W] in memory, scaled as an image file's."""
    from PIL import Image

    (_, full_height, full_width), (_, height, width) = image.shape, shape
    left, top, box_width, box_height = crop_boxes(crop, full_height, full_width, width / height).tolist()
    right, bottom = min(left + box_width, full_width), min(top + box_height, full_height)
    scaled = (
        Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        for channel in np.ascontiguousarray(image)
    )
    return np.stack([np.asarray(channel, dtype=np.float32) for channel in scaled])
