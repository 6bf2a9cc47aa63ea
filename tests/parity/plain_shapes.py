"""Images for one of the ladder's models, and what the plain ViT has to be told of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model import ModelConfig
from tests.parity.plain_vit import Shape, StageShape

IMAGES = 3


def images_of(config: ModelConfig) -> Tensor:
    """[IMAGES, C, H, W], all different."""
    sizes = config.resolve().sizes
    return torch.arange(IMAGES * sizes.channels * math.prod(sizes.image)).sin().view(IMAGES, -1, *sizes.image)


def plain_shape(config: ModelConfig) -> Shape:
    """Of a model, resolved or not."""
    m, sizes = config.resolve(), config.resolve().sizes
    return Shape(
        patch=sizes.patch, heads=sizes.last.heads, depth=sizes.depth, block=str(m.block), position=str(m.position),
        pool=str(m.pool), gelu=str(m.gelu), image=sizes.image, norm=str(m.norm), mlp=str(m.mlp),
        rope_base=m.rope_base or 100.0, feature_map=m.feature_map or "elu", eps=m.norm_eps or 1e-6,
        norm_after_pool=bool(m.norm_after_pool),
        stages=tuple(StageShape(s.depth, s.heads, s.kinds, s.window, s.grid) for s in sizes.stages),
    )  # fmt: skip
