"""Small parts of an image against its two views: multi-crop (Caron et al. 2020, SwAV; 2021, DINO).

Of V = 2 + K views of an image the first two are global. The loss is the mean over all 2 (V - 1) pairs of a view and a
global one of the same image, another than itself: 2 pairs of the global views, and 2 K of a local crop with either. A
local crop looks for its image's global view among those of the whole batch, one side at a time; nobody looks for it.

Legend: n samples of this rank, K local crops of each, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.contrastive import Gradients

Search = Callable[[Tensor, int], Gradients]
"""Of queries [n, E] for the global views of a side, 0 or 1: the loss, and gradients of queries (`left`), of that side
(`right`; None: keys have none) and of the scale."""


def with_local_crops(found: Gradients, crops: Sequence[Tensor], search: Search) -> tuple[Gradients, list[Tensor]]:
    """The loss of all pairs, and the gradients of the crops, as many as these. Collective.

    Args:
        found: of the global views, the mean of both ways. crops: [n, E], K times.
    """
    share = 1 / (2 + 2 * len(crops))
    assert found.left is not None and found.right is not None
    loss, scale, sides = found.loss * 2 * share, found.scale * 2 * share, [found.left, found.right]
    sides, own = [side * 2 * share for side in sides], list[Tensor]()
    for crop in crops:
        ways = [search(crop, side) for side in (0, 1)]
        loss = loss + share * torch.stack([way.loss for way in ways]).sum()
        scale = scale + share * torch.stack([way.scale for way in ways]).sum()
        own.append(share * torch.stack([way.left for way in ways if way.left is not None]).sum(0))
        sides = [
            side if way.right is None else side.add(way.right, alpha=share)
            for side, way in zip(sides, ways, strict=True)
        ]
    return Gradients(loss=loss, left=sides[0], right=sides[1], scale=scale, bias=found.bias), own


def by_view(outputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """Of micro-batches [K n_m, E], view by view in each -> [n, E], K times."""
    return [torch.cat(parts) for parts in zip(*(made.chunk(count) for made in outputs), strict=True)]


def by_micro_batch(views: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The inverse of `by_view`, n_m samples in each."""
    return [torch.cat(parts) for parts in zip(*(view.split([*counts]) for view in views), strict=True)]
