"""Full attention that notes the mean of its maps over heads while it makes them: what rollout needs of a forward pass.

A fused kernel makes every row and forgets it, so rows made again from queries and keys cost the attention once more.
Here heads are added up while their rows are in the caches (Kernels.mapped_attention), and rollout multiplies what is
there. No autograd.

Legend: B images, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from model.attention import Attention, FullAttention
from model.kernels import Kernels
from model.seeing.rows import Block
from model.taps import Tapped

_MOST = 4  # tokens over width, up to which maps take no more than twice what queries and keys would
_WRITTEN_OUT = Kernels("reference")


@dataclass(frozen=True)
class MeanMap:
    """A layer's map, meaned over heads.

    Attributes:
        rows: fp32 [B, S, S], each sums to 1.
    """

    rows: Tensor

    @property
    def heads(self) -> int:
        """As model.seeing.rollout.Mixing: their mean is one."""
        return 1

    @property
    def tokens(self) -> int:
        """As Mixing."""
        return self.rows.shape[2]

    def back(self, r: Tensor) -> Tensor:
        """Rollout's step, r [B, S] (A + I) / 2."""
        return torch.baddbmm(r[:, None], r[:, None], self.rows, beta=0.5, alpha=0.5)[:, 0]

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """As Mixing."""
        yield Block.whole(self.rows), self.rows[:, None]

    def gradients(self, block: Block) -> Tensor:
        """There are none: heads have theirs."""
        raise AssertionError("of a mean over heads")

    def total(self, x: Tensor) -> Tensor:
        """As Mixing."""
        return x


class Noting(nn.Module):
    """In the place of a mixer of full or causal attention, in one process and without autograd.

    Attributes:
        map: once it has run.
    """

    map: MeanMap

    def __init__(self, usual: FullAttention) -> None:
        super().__init__()
        self._causal, self._kernels = usual.causal, usual.kernels

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Mixer."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        # on a GPU there is no such kernel, also for a model whose own are to be `native`
        kernels = self._kernels if self._kernels.is_native("mapped_attention", q.device) else _WRITTEN_OUT
        out, maps = kernels.mapped_attention(*heads_first, causal=self._causal)
        self.map = MeanMap(maps)
        return out.transpose(1, 2)


def can_note(place: Tapped) -> TypeGuard[Attention]:
    """Whether the layer's map is to be noted: else rows are made again from queries and keys, which take less memory
    of many tokens and narrow models."""
    if not isinstance(place, Attention) or not isinstance(place.mixer, FullAttention):
        return False
    return place.site.tokens.context.size == 1 and place.tokens <= _MOST * place.site.here.width


@contextmanager
def noting(place: Attention) -> Iterator[Noting]:
    """Within, the layer notes its map."""
    usual = place.mixer
    assert isinstance(usual, FullAttention)
    place.mixer = other = Noting(usual)
    try:
        yield other
    finally:
        place.mixer = usual
