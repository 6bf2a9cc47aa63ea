"""Norms of queries and keys (Dehghani et al. 2023), which keep attention logits from growing without bound at scale.

Over each head's features, with a scale that the heads share, as in ViT-22B; or over those of all heads together, as in
InternViT (Chen et al. 2023), where tensor ranks exchange statistics.

Legend: R rows, h heads on this tensor rank, K head dim, n = h * K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.build import Build
from model.norm import Norm
from parallel.layout import TensorLayout, split_range
from parallel.tensor import norm_over_ranks


def qk_norm(build: Build) -> Norm:
    """Of queries or of keys."""
    here, tp, bias = build.here, build.tp, bool(build.config.qk_norm_bias)
    if build.config.qk_norm_over == "head":  # each tensor rank sees its own heads only: partial
        return Norm.of(build, here.head_dim, bias=bias, partial=True)
    layout = TensorLayout(
        shape=(here.width,), dim=0, segments=(here.width,), units=(here.head_dim,), parts=tp.size, index=tp.axis.index
    )
    return Norm.of(build, here.width, bias=bias, partial=False, layout=layout)


class QkNorm:
    """Applies both."""

    def __init__(self, build: Build) -> None:
        here, self.axis, self.kernels = build.here, build.tp.axis, build.kernels
        shares = [split_range(here.heads, self.axis.size, i) for i in range(self.axis.size)]
        self.counts = [(stop - start) * here.head_dim for start, stop in shares]
        self.over_width = build.config.qk_norm_over == "width"
        self.groups = 1 if self.over_width else build.part(here.heads)

    def __call__(self, qkv: Tensor, q_norm: Norm, k_norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """[R, 3 * n], this rank's heads of q, then of k, then of v -> q, k, v of R * n numbers each."""
        if self.over_width and self.axis.size > 1:
            return self._over_ranks(qkv, q_norm, k_norm)
        if q_norm.bias is None:
            return self.kernels.qk_norm(qkv, self.groups, q_norm.weight, k_norm.weight, q_norm.eps, rms=q_norm.rms)
        q, k, v = qkv.unflatten(1, (3, self.groups, -1)).unbind(1)
        return q_norm(q), k_norm(k), v

    def _over_ranks(self, qkv: Tensor, *norms: Norm) -> tuple[Tensor, Tensor, Tensor]:
        both, v = qkv.unflatten(1, (3, -1)).split([2, 1], 1)
        weight = torch.stack([norms[0].weight, norms[1].weight])
        biases: list[Tensor] = [norm.bias for norm in norms if norm.bias is not None]
        bias, eps, rms = torch.stack(biases) if biases else None, norms[0].eps, norms[0].rms
        y = norm_over_ranks(both, weight, bias, counts=self.counts, axis=self.axis, eps=eps, rms=rms)
        q, k = y.unbind(1)
        return q, k, v
