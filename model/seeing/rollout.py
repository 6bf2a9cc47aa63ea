"""What the pooled vector owes to each token of the first layer, found backwards through the layers, a row at a time.

The published methods multiply S x S matrices of all layers. Only one row of the product is looked at, that of the
class token, or the mean of the pooled ones; a row times a matrix is S^2, and needs the matrix in parts only, each of
which is made, used and forgotten. With A the mean over heads of a layer's rows, from the last layer to the first:

- rollout: r <- r N, N = A + I with its rows scaled to sum to 1: (A + I) / 2, but where the rows of linear attention sum
  to less (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers");
- relevance: r <- r (I + E), E = mean over heads of max(0, dA * A) (Chefer et al. 2021, "Generic Attention-model
  Explainability", their rule for self-attention);
- gradient rollout: r <- r N, N = I + E with its rows scaled to sum to 1.

The probe of attention pooling is no token: its row of A or E is where r begins. Through a patch merge a merged patch's
share is divided among its patches. Where ranks share a layer (its heads, or its tokens), each adds up its part, and
vectors of S numbers alone are summed over them.

Legend: B images, S tokens, h heads, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.seeing.noted import MeanMap
from model.seeing.rows import Block

Method = Literal["rollout", "relevance", "gradient_rollout"]
METHODS: tuple[Method, ...] = ("rollout", "relevance", "gradient_rollout")


class Mixing(Protocol):
    """A layer's rows, in parts: model.seeing.rows.Seen, or Maps.

    Attributes:
        heads: how many the layer has, of which some may be on other ranks. tokens: S.
    """

    @property
    def heads(self) -> int:
        """As above."""

    @property
    def tokens(self) -> int:
        """As above."""

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """Which queries and tokens, and their rows [B, h, queries, keys]; each query in one block."""

    def gradients(self, block: Block) -> Tensor:
        """Of what was differentiated by these rows [B, h, queries, keys]."""

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks that have heads or columns of the layer; x itself where there are no others."""


@dataclass(frozen=True)
class Maps:
    """Rows that are there already.

    Attributes:
        rows, grad: [B, h, Q, S].
    """

    rows: Tensor
    grad: Tensor | None = None

    @property
    def heads(self) -> int:
        """As Mixing."""
        return self.rows.shape[1]

    @property
    def tokens(self) -> int:
        """As Mixing."""
        return self.rows.shape[3]

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """As Mixing."""
        yield Block.whole(self.rows), self.rows

    def gradients(self, block: Block) -> Tensor:
        """As Mixing."""
        assert self.grad is not None
        return self.grad

    def total(self, x: Tensor) -> Tensor:
        """As Mixing."""
        return x


@dataclass(frozen=True)
class Merging:
    """2 x 2 patches become one, between two stages of a pyramid.

    Attributes:
        prefix: tokens before the patches. rows, cols: of the map before.
    """

    prefix: int
    rows: int
    cols: int

    def back(self, r: Tensor) -> Tensor:
        """[B, S after] -> [B, S before], of the same sum. A patch that is filled up takes no part."""
        high, wide = (self.rows + 1) // 2, (self.cols + 1) // 2
        real = F.pad(torch.ones(self.rows, self.cols), (0, self.cols % 2, 0, self.rows % 2))
        each = r[:, self.prefix :].unflatten(1, (high, wide)) / F.avg_pool2d(real[None], 2).to(r) / 4
        patches = each.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : self.rows, : self.cols]
        return torch.cat([r[:, : self.prefix], patches.flatten(1)], 1)


@dataclass(frozen=True)
class Trace:
    """A forward pass, as far as tokens mix.

    Attributes:
        steps: blocks and patch merges, in order. start: [B, S], the share of each of the last layer's tokens in what
            is pooled; None where a probe decides. probe: its rows.
    """

    steps: Sequence[Mixing | Merging]
    start: Tensor | None = None
    probe: Mixing | None = None


def back_through(trace: Trace, method: Method) -> Tensor:
    """[B, S] of the first layer's tokens; of rollout it sums to 1."""
    if trace.probe is None:
        assert trace.start is not None
        r = trace.start
    else:
        r = from_probe(trace.probe, method)
    for step in reversed(trace.steps):
        if isinstance(step, MeanMap):
            assert method == "rollout", "of means over heads"
            r = step.back(r)
        else:
            r = step.back(r) if isinstance(step, Merging) else through(r, step, method)
    return r


def from_probe(probe: Mixing, method: Method) -> Tensor:
    """Where r begins [B, S]: the probe's row. Collective over the ranks that share the layer, as `through` is."""
    ((block, rows),) = probe.blocks()
    own = _weighed(probe, block, rows, method)[:, 0]
    r = own.new_zeros(len(own), probe.tokens)
    r[:, block.keys] = own
    r = probe.total(r)
    return r / r.sum(1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny) if method == "gradient_rollout" else r


def through(r: Tensor, layer: Mixing, method: Method) -> Tensor:
    """r [B, S] by a layer's matrix."""
    stays, moves = torch.empty_like(r), torch.zeros_like(r)
    for block, rows in layer.blocks():
        weights, share = _weighed(layer, block, rows, method), r[:, block.queries]
        if method != "relevance":
            share = share / (1 + layer.total(weights.sum(-1)))
        stays[:, block.queries] = share  # what goes by the residual stream
        moves[:, block.keys] += torch.einsum("bq,bqs->bs", share, weights)
    return stays + layer.total(moves)


def _weighed(layer: Mixing, block: Block, rows: Tensor, method: Method) -> Tensor:
    """This rank's part of A or E [B, queries, keys]."""
    return (rows if method == "rollout" else (rows * layer.gradients(block)).clamp_(min=0)).sum(1) / layer.heads
