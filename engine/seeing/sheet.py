"""One picture of what layers attend to: a line for each image, then a column for each layer; drawn in milliseconds, as
other ranks may wait.

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Pixels = NDArray[np.uint8]

_CELL = 96  # pixels of a cell's longer side, at least
_GAP, _TITLE = 4, 14  # pixels between cells, and above them
RANGE = (0.01, 0.99)
"""Quantiles of a map that colours run between."""


def sheet(images: Tensor, maps: Mapping[str, Tensor], patch: int) -> bytes:
    """A PNG.

    Args:
        images: [N, C, H, W] in 0..1. maps: [N, rows, cols] by the titles of their columns, each in colours of its own
            (viridis): the brightest patch has the largest share. patch: as of `side_of`.
    """
    high, wide = images.shape[2:]
    times = max(1, -(-_CELL // max(high, wide)))
    size = high * times, wide * times
    columns = {"image": _enlarged(grey_or_rgb(images), times)}
    for title, of in maps.items():
        columns[title] = _enlarged(_coloured(of), side_of(of.shape[1:], (high, wide), patch) * times)
    line, column = size[0] + _GAP, size[1] + _GAP
    canvas = np.full((_TITLE + line * len(images), column * len(columns), 3), 255, dtype=np.uint8)
    for j, cells in enumerate(columns.values()):
        for i, cell in enumerate(cells):
            canvas[_TITLE + i * line :, j * column :][: size[0], : size[1]] = cell[: size[0], : size[1]]
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for j, title in enumerate(columns):
        draw.text((j * column + 1, 1), title, fill=(0, 0, 0))
    file = io.BytesIO()
    picture.save(file, format="png", compress_level=1)
    return file.getvalue()


def side_of(grid: Sequence[int], image: Sequence[int], patch: int) -> int:
    """Of the patches of a map (rows, cols), in pixels of its image (H, W).

    Args:
        patch: of the first stage; those of a pyramid's later stages are 2, 4, ... times as large, and may reach beyond
            the image.
    """
    while patch * grid[0] < image[0] or patch * grid[1] < image[1]:
        patch *= 2
    return patch


def grey_or_rgb(images: Tensor) -> Tensor:
    """[N, 3, H, W]; of images with other than three channels the first."""
    return images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)


def _coloured(maps: Tensor) -> Tensor:
    """[N, rows, cols] -> [N, 3, rows, cols]; what is not finite is white."""
    import matplotlib  # a tenth of a second

    flat = maps.flatten(1).nan_to_num(0.0, 0.0, 0.0)
    low, top = flat.quantile(torch.tensor(RANGE), 1)[..., None]
    shares = ((flat - low) / (top - low).clamp(min=torch.finfo(flat.dtype).tiny)).clamp(0, 1)
    table = matplotlib.colormaps["viridis"](shares.numpy(), bytes=False)[..., :3]
    colors = torch.from_numpy(table).float().view(*maps.shape, 3)
    return torch.where(maps.isfinite()[..., None], colors, 1.0).permute(0, 3, 1, 2)


def _enlarged(cells: Tensor, side: int) -> Pixels:
    """[N, 3, rows, cols] -> [N, rows * side, cols * side, 3], each number a square."""
    small: Pixels = (cells.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return small.repeat(side, 1).repeat(side, 2)
