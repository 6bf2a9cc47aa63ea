"""The ViT that one would write in an afternoon: plain eager PyTorch, the yardstick of the `peers` benchmark.

The mathematics of `block: sequential`, `position: learned_1d`, `pool: cls`, without any part of the engine: nn.Linear,
nn.LayerNorm, scaled_dot_product_attention, as in timm's VisionTransformer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Sizes


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        b, s, d = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d))
        return y


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class EagerViT(nn.Module):
    """Patch convolution, class token, one table of positions, blocks, norm, linear head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        here = sizes.last
        d = here.width
        self.patch = nn.Conv2d(sizes.channels, d, sizes.patch, sizes.patch)
        self.cls = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, sizes.tokens, d) * 0.02)
        self.blocks = nn.Sequential(*(Block(d, here.heads, here.mlp) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, sizes.classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y
