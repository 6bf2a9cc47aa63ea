"""Numbers of attention rows: how spread a head looks, and how far.

Legend: B images, h heads, Q queries, S tokens, P of them prefix tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(rows: Tensor) -> Tensor:
    """Of each head, in nats: 0 where it sees one token, ln S where it sees all alike. [B, h, Q, S] -> [B, h]."""
    return torch.special.entr(rows).sum(-1).mean(2)


def distances(rows: Tensor, queries: Tensor, grid: tuple[int, int], prefix: int) -> tuple[Tensor, Tensor]:
    """How far a head looks, in patches (Dosovitskiy et al. 2021, figure 7): [B, h, Q, S] -> the sum over queries, and
    how many they are [B, h]; the mean is their quotient.

    A query's distance is that between centres of patches, weighted by the shares that it takes of them; queries that
    are no patch, or take nothing of patches, have none and are not counted.

    Args:
        queries: int64 [Q], which tokens they are; -1 for a probe.
    """
    patches = queries >= prefix
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(rows.dtype)
    apart = torch.cdist(places[queries[patches] - prefix], places).to(rows.device)
    seen = rows[:, :, patches, prefix:]
    shares = seen.sum(-1)
    far = (seen * apart).sum(-1) / torch.where(shares > 0, shares, 1)
    return far.sum(2), (shares > 0).sum(2)
