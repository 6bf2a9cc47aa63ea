"""Full attention that notes the mean of its maps over heads while it makes them: what rollout needs of a forward pass.

A fused kernel makes every row and forgets it, so rows made again from queries and keys cost the attention once more.
Here some queries at a time attend with all heads, written out, and heads are added up while their rows are in the
caches: little slower than the fused kernel, without autograd. Rollout then multiplies what is there.

Legend: B images, S tokens, h heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from model.attention import Attention, FullAttention
from model.seeing.rows import Block
from model.taps import Tapped

_BYTES = 16 * 2**20  # of all heads' rows at once, some of which stay in the caches
_MOST = 4  # tokens over width, up to which maps take no more than twice what queries and keys would


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

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self._causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Mixer."""
        assert not torch.is_grad_enabled()
        wide = torch.promote_types(q.dtype, torch.float32)
        maps = torch.empty(q.shape[0], q.shape[1], q.shape[1], dtype=wide, device=q.device)
        out = torch.empty_like(q)
        q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
        for image, mean in enumerate(maps):
            found = self._attend(q[image].contiguous(), k[image].contiguous(), v[image].contiguous(), mean)
            out[image] = found.transpose(0, 1)
        self.map = MeanMap(maps)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor) -> Tensor:
        """Of one image [h, S, K] each -> the same; fills the map [S, S]."""
        h, s, _ = q.shape
        q, keys, share = q / math.sqrt(q.shape[-1]), k.transpose(1, 2), q.new_full((1, h), 1 / h)
        out = torch.empty_like(q)
        step = max(1, _BYTES // (q.element_size() * h * s))
        for start in range(0, s, step):
            part = slice(start, min(start + step, s))
            rows = q[:, part] @ keys
            if self._causal:
                later = torch.ones(rows.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1)
                rows.masked_fill_(later, -math.inf)
            rows = rows.softmax(-1)
            torch.mm(share, rows.flatten(1), out=mean[part].view(1, -1))
            out[:, part] = rows @ v
        return out


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
    place.mixer = other = Noting(usual.causal)
    try:
        yield other
    finally:
        place.mixer = usual
