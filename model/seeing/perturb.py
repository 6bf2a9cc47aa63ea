"""What a score loses where the image is hidden: slow, and true of any model, so what faster methods are held against.

Legend: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Score = Callable[[Tensor], Tensor]
"""Images [n B, C, H, W], the same B n times in turn, other parts hidden each time -> a number for each [n B], of the
same class of each of the B whatever is hidden."""


@torch.no_grad()
def occlusion(score: Score, images: Tensor, side: int, stride: int, fill: float = 0.0, *, at_once: int = 1) -> Tensor:
    """What the score loses when a square is hidden (Zeiler and Fergus 2014): [B, H, W], each pixel the mean over the
    squares that cover it.

    Args:
        side, stride: of squares, in pixels; those at the right and at the bottom may be cut. fill: what hides, 0 being
            the mean of normalised pixels. at_once: squares of all images that the score is asked of at once.
    """
    b, _, high, wide = images.shape
    before = score(images)
    lost, times = images.new_zeros(b, high, wide), images.new_zeros(high, wide)
    corners = [(top, left) for top in range(0, high, stride) for left in range(0, wide, stride)]
    squares = [(slice(top, top + side), slice(left, left + side)) for top, left in corners]
    for start in range(0, len(squares), at_once):
        some = squares[start : start + at_once]
        hidden = images.repeat(len(some), 1, 1, 1)
        for square, copy in zip(some, hidden.split(b), strict=True):
            copy[:, :, *square] = fill
        for square, after in zip(some, score(hidden).split(b), strict=True):
            lost[:, *square] += (before - after)[:, None, None]
            times[square] += 1
    return lost / times


@torch.no_grad()
def rise(
    score: Score, images: Tensor, *, masks: int = 1000, cells: int = 7, kept: float = 0.5, seed: int = 0,
    fill: float = 0.0, at_once: int = 1,
) -> Tensor:  # fmt: skip
    """The mean score over random masks that leave a pixel visible (Petsiuk et al. 2018, RISE): [B, H, W].

    Args:
        masks: how many; the noise falls with their root. cells: a mask is a grid of so many cells a side, each visible
            with the chance `kept`, enlarged smoothly and moved at random by less than a cell. seed: of the masks.
            at_once: masks of all images that the score is asked of at once.
    """
    generator = torch.Generator().manual_seed(seed)
    b, _, high, wide = images.shape
    tall, broad = -(-high // cells), -(-wide // cells)
    total = images.new_zeros(b, high, wide)

    def drawn() -> Tensor:
        grid = (torch.rand(1, 1, cells, cells, generator=generator) < kept).float()
        size = ((cells + 1) * tall, (cells + 1) * broad)
        large = F.interpolate(grid, size, mode="bilinear", align_corners=False)[0, 0]
        top, left = (int(torch.randint(n, (), generator=generator)) for n in (tall, broad))
        return large[top : top + high, left : left + wide].to(images)

    for start in range(0, masks, at_once):
        some = [drawn() for _ in range(min(at_once, masks - start))]
        scores = score(torch.cat([images * mask + fill * (1 - mask) for mask in some]))
        for mask, values in zip(some, scores.split(b), strict=True):
            total += values[:, None, None] * mask
    return total / (masks * kept)
