"""A model with tables of rows and columns, or of sines, is the same model with one table."""

from __future__ import annotations

import pytest
import torch

from model import ModelConfig, VisionTransformer
from model.formats.base import Description
from model.formats.positions import with_table
from model.pretrained import ModuleWeights


@pytest.mark.parametrize("pool", ["cls", "gap"])
@pytest.mark.parametrize("position", ["learned_2d", "sincos_2d"])
def test_positions_leave_as_one_table(position: str, pool: str) -> None:
    """Logits of what another library is given are the same bit for bit."""
    config = ModelConfig(
        width=16, depth=1, num_heads=2, image_size=(8, 12), patch_size=4, num_classes=3, position=position, pool=pool
    )  # type: ignore[arg-type]
    model = VisionTransformer(config, seed=3).eval()
    weights = with_table(ModuleWeights(model, Description(model=model.config), {}))
    there = VisionTransformer(weights.description.model, seed=None).eval()
    there.load({name: weights.read(name) for name in weights.tensors})
    assert there.config.position == "learned_1d" and there.get_parameter("embed.pos").shape == (6, 16)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(model(images), there(images))


def test_others_stay_as_they_are() -> None:
    model = VisionTransformer(ModelConfig(width=16, depth=1, num_heads=2, image_size=8, patch_size=4, position="none"))
    weights = ModuleWeights(model, Description(model=model.config), {})
    assert with_table(weights) is weights
