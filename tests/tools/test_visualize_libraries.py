"""tools.visualize on models of other libraries, random ones: what heads attend to is what those libraries compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

from parallel.process_group import World
from tests.model.formats import test_huggingface, test_open_clip, test_timm, timm_models
from tools.convert.images import prepared
from tools.convert.libraries import library
from tools.visualize import __main__ as command
from tools.visualize import models

Weights = Callable[[Tensor], list[Tensor]]


def of_timm(folder: Path) -> Weights:
    """With explicit attention, whose weights pass through a dropout."""
    made = timm_models.randomised("vit_base_patch16_224", test_timm.TINY | {"reg_tokens": 2})
    timm_models.saved(made, folder)
    found = list[Tensor]()
    for block in made.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, out: found.append(out))
    return lambda images: (made(images), found)[1]


def of_transformers(folder: Path) -> Weights:
    """Its own output."""
    torch.manual_seed(0)
    made = hf.ViTForImageClassification(
        hf.ViTConfig(**test_huggingface.TINY, num_labels=5, attn_implementation="eager")
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    made.eval().save_pretrained(folder)
    return lambda images: list(made(images, output_attentions=True).attentions)


def of_open_clip(folder: Path) -> Weights:
    """torch.nn.MultiheadAttention, asked for its weights."""
    cfg = test_open_clip.config_of({}, {})
    made: Any = test_open_clip.random(library("open_clip.model").CLIP(**cfg)).eval()
    test_open_clip.save(folder, cfg, made.state_dict())
    found = list[Tensor]()
    for block in made.visual.transformer.resblocks:
        block.attn.register_forward_pre_hook(
            lambda _, given, named: (given, named | {"need_weights": True, "average_attn_weights": False}),
            with_kwargs=True,
        )
        block.attn.register_forward_hook(lambda _, __, out: found.append(out[1]))
    return lambda images: (made.encode_image(images), found)[1]


@pytest.mark.parametrize("library_of", [of_timm, of_transformers, of_open_clip])
@torch.no_grad()
def test_heads_are_theirs(
    library_of: Callable[[Path], Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "prepare_cpu", lambda world: None)
    weights = library_of(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    words = ["--checkpoint", str(tmp_path / "model"), "--images", str(tmp_path / "image.png"), "--out", str(tmp_path)]
    for method in ("heads", "rollout"):
        assert command.main([*words, "--method", method], World()) == 0
    found, rollout = np.load(tmp_path / "heads.npz"), np.load(tmp_path / "rollout.npz")["tokens"]
    looked = models.Alone(command.parse_options([*words, "--method", "heads"], World())[0], World())
    image = prepared(tmp_path / "image.png", 3, (32, 32), looked.how)
    product, theirs = torch.eye(rollout.shape[1]), weights(image[None])
    assert len(theirs) == 2
    for number, layer in enumerate(theirs):
        for head in range(layer.shape[1]):
            row = layer[0, head, 0, -16:].view(4, 4)
            assert np.allclose(found[f"blocks.{number}/head {head}"][0], row, rtol=1e-3, atol=1e-6), (number, head)
        product = (layer[0].mean(0) + torch.eye(len(product))) / 2 @ product
    assert np.allclose(rollout[0], product[0], rtol=1e-3, atol=1e-6)
