"""Multi-head self-attention on packed rows of q, k and v.

Legend: B images, S tokens, H heads, K head dim, T tensor-parallel size, h = H/T heads on this rank.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.norm import EPS, LayerNorm


class Attention(nn.Module):
    """Softmax attention of all tokens to all tokens, with optional QK normalisation, on this rank's heads.

    QK normalisation (Dehghani et al. 2023) is a LayerNorm over each head's features, its scale shared by the heads, no
    bias: it keeps attention logits from growing without bound at scale.
    """

    def __init__(self, build: Build) -> None:
        super().__init__()
        sizes = build.sizes
        self.heads, self.head_dim, self.tokens = sizes.heads // build.tp.size, sizes.head_dim, sizes.tokens
        self.kernels = build.kernels
        self.q_norm: LayerNorm | None = None
        self.k_norm: LayerNorm | None = None
        if build.config.qk_norm:  # each tensor rank sees its own heads only: partial
            self.q_norm = LayerNorm(self.head_dim, bias=False, partial=True, kernels=build.kernels)
            self.k_norm = LayerNorm(self.head_dim, bias=False, partial=True, kernels=build.kernels)

    def forward(self, qkv: Tensor) -> Tensor:
        """[R, 3 * h * K], this rank's heads of q, then of k, then of v -> [R, h * K]."""
        if self.q_norm is not None and self.k_norm is not None:
            parts = self.kernels.qk_norm(qkv, self.heads, self.q_norm.weight, self.k_norm.weight, EPS)
        else:
            parts = qkv.unflatten(1, (3, self.heads, self.head_dim)).unbind(1)
        q, k, v = (part.unflatten(0, (-1, self.tokens)).transpose(1, 2) for part in parts)  # [B, h, S, K] each
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(-1, self.heads * self.head_dim)
