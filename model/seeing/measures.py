"""Numbers of attention rows: how spread a head looks, and how far.

Legend: B images, h heads, Q queries, S tokens, P of them prefix tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(rows: Tensor) -> Tensor:
    """Of each head, in nats: 0 where it sees one token, ln S where it sees all alike. [B, h, Q, S] -> [B, h]."""
    return torch.special.entr(rows).sum(-1).mean(2)


def mean_distance(rows: Tensor, queries: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """How far a head looks, on average, in patches (Dosovitskiy et al. 2021, figure 7): [B, h, Q, S] ->
    [B, h].

    Distances are between centres of patches, weighted by the shares of patches, which prefix tokens have no part in;
    NaN where no query is a patch, or patches have no share.

    Args:
        queries: int64 [Q], which tokens they are.
    """
    patches = queries >= prefix
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(rows.dtype)
    apart = torch.cdist(places[queries[patches] - prefix], places).to(rows.device)
    seen = rows[:, :, patches, prefix:]
    return ((seen * apart).sum(-1) / seen.sum(-1)).mean(2)


def stretched(maps: Tensor, low: float = 1.0, high: float = 99.0) -> Tensor:
    """[N, rows, cols] to 0..1, each map by percentiles of its own, so that one bright patch does not darken the rest.

    Of a map that is the same everywhere, zeros.
    """
    flat = maps.flatten(1).float()
    at = torch.tensor([low / 100, high / 100], dtype=flat.dtype, device=flat.device)
    bottom, top = torch.quantile(flat, at, 1)[:, :, None]
    span = top - bottom
    scaled = torch.where(span > 0, (flat - bottom) / torch.where(span > 0, span, 1), 0)
    return scaled.clamp(0, 1).view(maps.shape)
