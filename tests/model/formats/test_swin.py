"""timm's Swin, made, saved and loaded by timm itself, against our pyramid of windows with relative positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ModelConfig, StageConfig, VisionTransformer
from model.formats import writing
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError
from model.formats.timm import swin
from model.formats.timm.arguments import constructor_of
from tests.model.formats.timm_models import checked, randomised, saved
from tools.convert.runners import RUNNERS

SWIN = "swin_tiny_patch4_window7_224"
TINY = {
    "img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4, "num_classes": 5,
}  # fmt: skip
CASES: dict[str, Mapping[str, Any]] = {
    "one window in the last stage": {},
    "windows larger than the map": {"window_size": 8, "img_size": 32, "depths": (2, 1, 1), "qkv_bias": False},
    "a rectangle": {"img_size": (64, 128), "num_classes": 0, "in_chans": 1},
    "windows of each stage": {"window_size": (8, 4, 2), "mlp_ratio": (2.0, 3.0, 4.0), "depths": (1, 2, 3)},
    "odd maps, filled up when they are merged": {"img_size": 56, "window_size": 7},
    "two stages, odd windows": {"depths": (2, 2), "num_heads": (2, 2), "img_size": 48, "window_size": (3, 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_timm_saves_and_loads(case: str, tmp_path: Path) -> None:
    saved(randomised(SWIN, {**TINY, **CASES[case]}), tmp_path / "theirs", safe=case != "a rectangle")
    checked(tmp_path)


def test_buffers_of_older_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a large model is one file, since timm reads no shards."""
    saved(randomised(SWIN, TINY), tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    buffers = {"relative_position_index": torch.zeros(16, 16, dtype=torch.int64), "attn_mask": torch.zeros(4, 16, 16)}
    more = {f"layers.0.blocks.1.attn.{name}": buffer for name, buffer in buffers.items()}
    save_file(tensors | more, file)
    monkeypatch.setattr(writing, "SHARD_BYTES", 1000)
    with open_weights(tmp_path / "theirs") as weights:
        assert sorted(weights.left_out) == sorted(more)
        save_weights(weights, tmp_path / "back", "timm")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_a_bare_file(tmp_path: Path) -> None:
    """Tables of relative positions tell heads and windows."""
    model = randomised(SWIN, TINY)
    torch.save(model.state_dict(), tmp_path / "swin.pth")
    with pytest.raises(ConversionError, match=r"--model\.image_size"):
        open_weights(tmp_path / "swin.pth").__enter__()
    ours = VisionTransformer.from_pretrained(tmp_path / "swin.pth", given={"image_size": 64}).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), model(images), rtol=0, atol=1e-5)
    old = {name.replace("layers.1.downsample", "layers.0.downsample"): x for name, x in model.state_dict().items()}
    torch.save(old, tmp_path / "old.pth")
    with pytest.raises(ConversionError, match="Microsoft"):
        open_weights(tmp_path / "old.pth", given={"image_size": 64}).__enter__()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"img_size": 72, "window_size": 4}, "windows of 4 on a map of 18 x 18"),
        ({"window_size": [[7, 14]] * 4}, "window_size"),
        ({"always_partition": True}, "always_partition"),
        ({"head_dim": 16}, "head_dim"),
        ({"global_pool": "max"}, "global_pool"),
        ({"norm_layer": "rmsnorm"}, "norm_layer"),
        ({"mlp_layer": "SwiGLU"}, "mlp_layer"),
    ],
)
def test_arguments_that_our_model_has_not_are_refused_by_name(changed: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        swin.model_of(constructor_of({"architecture": SWIN, "model_args": changed}))


def _pyramid(**changed: Any) -> ModelConfig:
    kinds = ("window", "shifted_window")
    stages = [{"depth": 2, "width": 16 * 2**i, "num_heads": 2, "window_size": 2, "attention": kinds} for i in range(2)]
    for key, (i, value) in changed.pop("stage", {}).items():
        stages[i][key] = value
    keys: dict[str, Any] = {
        "image_size": 32, "patch_size": 4, "norm_eps": 1e-5, "pre_norm": True, "position": "none", "pool": "gap",
        "relative_position": True, "num_classes": 3,
    } | changed  # fmt: skip
    return ModelConfig(stages=tuple(StageConfig(**stage) for stage in stages), **keys)  # type: ignore[arg-type]


def test_a_pyramid_that_never_came_from_timm(tmp_path: Path) -> None:
    for name, keys in {"plain": {}, "few biases": {"norm_bias": False, "qkv_bias": "qv", "patch_bias": False}}.items():
        model = VisionTransformer(_pyramid(**keys)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(tmp_path / name, "timm")
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(
                RUNNERS["timm"](tmp_path / name, images).logits, model(images), rtol=0, atol=1e-5
            )
        assert json.loads((tmp_path / name / "config.json").read_text())["architecture"] == SWIN


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"norm_eps": 1e-6}, "model.norm_eps"),
        ({"relative_position": False}, "model.relative_position"),
        ({"position": "learned_2d"}, "model.position"),
        ({"pre_norm": False}, "model.pre_norm"),
        ({"pool": "map"}, "model.pool"),
        ({"gelu": "tanh"}, "model.gelu"),
        ({"registers": 1}, "model.registers"),
        ({"image_size": 24}, "windows of 2 on a map of 3 x 3"),
        ({"image_size": 30}, "model.image_size"),
        ({"stage": {"width": (1, 48)}}, "width is 48"),
        ({"stage": {"attention": (0, ("window", "window"))}}, "alternates"),
    ],
)
def test_pyramids_that_timm_has_not_are_refused_by_name(changed: Mapping[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=named):
        VisionTransformer(_pyramid(**changed)).save_pretrained(tmp_path / "there", "timm")
