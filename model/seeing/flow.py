"""Attention flow (Abnar and Zuidema 2020): the most that can flow from what is pooled to each token of the first layer.

Layers are levels of a graph; an edge from a token to one of the level below carries at most what it takes of it: half
by attention, half by the residual stream. A maximal flow is computed for each token; edges are pruned to the strongest
of each token, without which S^2 edges a layer make it slow beyond a hundred tokens.

Legend: L layers, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_UNIT = 10**6  # the solver's capacities are whole numbers
KEPT = 16


def attention_flow(maps: Sequence[Tensor], start: Tensor, kept: int = KEPT) -> Tensor:
    """Of one image.

    Args:
        maps: rows meaned over heads, [S, S] of each layer, from the first to the last. start: [S], the share of each of
            the last layer's tokens in what is pooled. kept: edges of each token and layer, the strongest ones.

    Returns:
        fp32 [S], to each token of the first layer, at most 1.
    """
    from scipy.sparse import csr_array  # half a second, of which no other method has a use
    from scipy.sparse.csgraph import maximum_flow

    edges, total, size = list[tuple[Tensor, Tensor, Tensor]](), len(start), len(maps)
    source = (size + 1) * total  # level l has tokens l S to (l + 1) S - 1; level 0 is the first layer's input
    begins = start.nonzero()[:, 0]
    edges.append((torch.full_like(begins, source), size * total + begins, start[begins]))
    for level, rows in enumerate(maps):
        matrix = (rows.float() + torch.eye(total)) / 2
        share, below = matrix.topk(min(kept, total), 1)
        above = torch.arange(total)[:, None].expand_as(below)
        edges.append((((level + 1) * total + above).flatten(), (level * total + below).flatten(), share.flatten()))
    tails, heads, shares = (torch.cat([edge[i] for edge in edges]).numpy() for i in range(3))
    capacities = np.rint(shares * _UNIT).astype(np.int32)
    graph = csr_array((capacities, (tails, heads)), shape=(source + 1, source + 1))
    flows = [float(maximum_flow(graph, source, token).flow_value) / _UNIT for token in range(total)]
    return torch.tensor(flows, dtype=torch.float32)
