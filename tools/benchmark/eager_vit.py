"""The ViT that one would write in an afternoon: plain eager PyTorch, the yardstick of the `peers` benchmark.

The mathematics of `block: sequential`, `position: learned_1d`, `pool: cls`, without any part of the engine: nn.Linear,
nn.LayerNorm, scaled_dot_product_attention, as in timm's VisionTransformer. Importing it loads torch alone, so that the
memory of a process that trains it is that of the program measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from model.sizes import Sizes

# Beginnings of names, here and in the engine's model; what is not among them has the same name in both.
_IN_VITRUVIUS = {"patch.": "embed.", "cls": "embed.cls", "pos": "embed.pos", "norm.": "head.norm.", "head.": "head.fc."}


@dataclass(frozen=True, kw_only=True)
class EagerSizes:
    """The numbers of the model. tokens: per image, the class token among them. patch: side, in pixels."""

    channels: int
    patch: int
    tokens: int
    width: int
    depth: int
    heads: int
    mlp: int
    classes: int

    @staticmethod
    def of(sizes: Sizes) -> EagerSizes:
        """Those of a model of the engine's that has one stage."""
        here = sizes.last
        return EagerSizes(
            channels=sizes.channels,
            patch=sizes.patch,
            tokens=sizes.tokens,
            width=here.width,
            depth=sizes.depth,
            heads=here.heads,
            mlp=here.mlp,
            classes=sizes.classes,
        )


def name_in_vitruvius(name: str) -> str:
    """Of a parameter of EagerViT, the name in the engine's model; the values lie in the same order in both."""
    for ours, theirs in _IN_VITRUVIUS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """For AdamW, as the engine has it: matrices and the patch kernel decay, norms, biases and tokens do not.

    Told by the names, since sharded parameters need not have their shapes.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in named:
        groups[not name.endswith(".weight") or "norm" in name].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


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

    def __init__(self, sizes: EagerSizes) -> None:
        super().__init__()
        d = sizes.width
        self.patch = nn.Conv2d(sizes.channels, d, sizes.patch, sizes.patch)
        self.cls = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, sizes.tokens, d) * 0.02)
        self.blocks = nn.Sequential(*(Block(d, sizes.heads, sizes.mlp) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, sizes.classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        return self.classify(self.blocks(self.embed(images)))

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, S, D]."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos

    def classify(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, classes]."""
        y: Tensor = self.head(self.norm(x)[:, 0])
        return y
