"""Whether a map says what the model goes by: insertion and deletion (Petsiuk et al. 2018, RISE), and the pointing game
(Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop").

Legend: B images, C channels, N = rows x cols patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.seeing.perturb import Score


@dataclass(frozen=True)
class Areas:
    """Under the curves of a score over the share of patches that were changed, of each image [B].

    Attributes:
        insertion: patches come into an empty image, those of the largest shares first; the larger the better.
            deletion: they go from the image in the same order; the smaller the better.
    """

    insertion: Tensor
    deletion: Tensor


@torch.no_grad()
def areas(score: Score, images: Tensor, maps: Tensor, *, fill: float = 0.0, at_once: int = 16) -> Areas:
    """Args:
    score: in 0..1. images: [B, C, H, W], of patches that fill them. maps: [B, rows, cols]. fill: of missing
        pixels, 0 being the mean of normalised ones. at_once: versions of all images that the score is asked of at once.
    """
    b, rows, cols = maps.shape
    side = images.shape[2] // rows, images.shape[3] // cols
    rank = maps.flatten(1).argsort(1, descending=True).argsort(1).view(b, rows, cols)
    rank = rank.repeat_interleave(side[0], 1).repeat_interleave(side[1], 2)[:, None]
    found = dict[bool, list[Tensor]]({True: [], False: []})
    counts = range(rows * cols + 1)
    for inserts, values in found.items():
        for start in range(0, len(counts), at_once):
            some = counts[start : start + at_once]
            shown = torch.cat([torch.where((rank < count) == inserts, images, fill) for count in some])
            values += score(shown).split(b)
    insertion, deletion = (torch.trapezoid(torch.stack(values), dim=0) / (rows * cols) for values in found.values())
    return Areas(insertion, deletion)


def points(maps: Tensor, inside: Tensor) -> Tensor:
    """Whether the patch of the largest share is one of those that show the object: [B, rows, cols] each -> bool [B]."""
    best = maps.flatten(1).argmax(1, keepdim=True)
    return inside.flatten(1).gather(1, best)[:, 0]
