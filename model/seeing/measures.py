"""Numbers of attention rows: how spread a head looks, and how far.

Legend: B images, h heads, Q queries, s tokens that these may see, of S.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(rows: Tensor) -> Tensor:
    """Of each head, in nats: 0 where it sees one token, ln S where it sees all alike. [B, h, Q, s] -> [B, h]."""
    return torch.special.entr(rows).sum(-1).mean(2)


def distances(rows: Tensor, queries: Tensor, keys: Tensor, grid: tuple[int, int], prefix: int) -> tuple[Tensor, Tensor]:
    """How far a head looks, in patches (Dosovitskiy et al. 2021, figure 7): [B, h, Q, s] -> the sum over queries, and
    how many they are [B, h]; the mean is their quotient.

    A query's distance is that between centres of patches, weighted by the shares that it takes of them; queries that
    are no patch, or take nothing of patches, have none and are not counted.

    Args:
        queries: int64 [Q], which tokens they are; -1 for a probe. keys: int64 [s], which the rows are over; of others
            the queries take nothing.
    """
    patches, of_patches = queries >= prefix, keys >= prefix
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(rows.dtype)
    apart = torch.cdist(places[queries[patches] - prefix], places[keys[of_patches] - prefix]).to(rows.device)
    seen = rows[:, :, patches][..., of_patches]
    shares = seen.sum(-1)
    far = (seen * apart).sum(-1) / torch.where(shares > 0, shares, 1)
    return far.sum(2), (shares > 0).sum(2)
