"""A box of an image, scaled by itself as torchvision cuts random crops, antialiasing; then mirrored and normalised.

Of bytes a module of C++ (csrc/pixels) makes all that in one pass, where it is built and the processor has AVX2. Its
bits are those of torch, which serves elsewhere: ranks and restarts with and without it give the same numbers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.float32]
Edges = tuple[int, int, int, int]  # top, bottom, left, right, in whole pixels


@dataclass(frozen=True)
class Finish:
    """What is done to images when they are read, so that it takes no other pass over memory.

    mirrored: [B] of which images, left to right. mean, std: [C] what is subtracted, then divided by.
    """

    mirrored: NDArray[np.bool_]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def of(self, rows: Any) -> Finish:
        """That of some of the images, by their rows."""
        return Finish(self.mirrored[rows], self.mean, self.std)

    def __call__(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first image [C, H, W], finished."""
        image = image[:, :, ::-1] if self.mirrored[0] else image
        return (image - self.mean[:, None, None]) / self.std[:, None, None]


def scaler_name() -> str:
    """Who scales crops in this process, for the start-up report."""
    return "torch (no native module)" if native() is None else "the native module"


def scaled(
    pixels: Pixels, edges: Edges, shape: tuple[int, int, int], white: int, finish: Finish | None = None
) -> NDArray[np.float32]:
    """The box of an image [H, W] or [H, W, C] in `shape`, [C, h, w], C being 1 or 3; in 0..1 if it is not finished.

    `white` is what becomes 1: of bytes 255.
    """
    module, channels = native(), 1 if pixels.ndim == 2 else pixels.shape[2]
    if module is None or pixels.dtype != np.uint8 or channels != shape[0]:
        found = np.broadcast_to(_by_torch(pixels, edges, shape[1:], white), shape)
        return found if finish is None else finish(found)
    out = np.empty(shape, dtype=np.float32)
    how = finish or Finish(np.zeros(1, np.bool_), np.zeros(channels, np.float32), np.ones(channels, np.float32))
    module.cut(pixels, *edges, bool(how.mirrored[0]), how.mean, how.std, out)
    return out


def _by_torch(pixels: Pixels, edges: Edges, size: tuple[int, int], white: int) -> NDArray[np.float32]:
    top, bottom, left, right = edges
    part = torch.from_numpy(pixels[top:bottom, left:right])
    part = part[None, None] if part.ndim == 2 else part.permute(2, 0, 1)[None]
    scaled = F.interpolate(part, size=size, mode="bilinear", antialias=True)[0].contiguous()
    return scaled.to(torch.float32).div_(white).numpy()


@cache
def native() -> ModuleType | None:
    """The module; None: it is not built, or not for this processor."""
    try:
        found = importlib.import_module("data._pixels")
    except ImportError:
        return None
    return found if found.runs() else None
