"""timm's Hiera as far as it is a ViT: what timm saves and loads itself, against ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError
from model.formats.timm import hiera
from model.formats.timm.arguments import constructor_of
from tests.model.formats.timm_models import randomised, same, saved
from tools.convert.runners import vitruvius
from tools.convert.runners.timm import run
from tools.convert.verify import images_for

PLAIN: dict[str, Any] = {
    "img_size": 64, "embed_dim": 16, "num_heads": 2, "num_classes": 5, "q_pool": 0, "dim_mul": 1, "head_mul": 1,
    "patch_kernel": (4, 4), "patch_padding": (0, 0),
}  # fmt: skip
CASES: dict[str, Mapping[str, Any]] = {
    "one stage": {"stages": (2,), "mask_unit_attn": (False,), "dim_mul": 2, "init_values": 0.1},
    "windows, then everywhere": {"stages": (1, 1, 1, 2), "mask_unit_attn": (True, True, False, False)},
    "a rectangle": {
        "stages": (1, 2), "mask_unit_attn": (True, False), "mask_unit_size": (2, 2), "img_size": (32, 48),
        "num_classes": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_timm_saves_and_loads(case: str, tmp_path: Path) -> None:
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    saved(randomised("hiera_tiny_224", {**PLAIN, **CASES[case]}), theirs)
    with open_weights(theirs) as weights:
        images = images_for(weights.description)
        same(run(theirs, images), vitruvius.run_weights(weights, images))
        save_weights(weights, tmp_path / "ours")
    with open_weights(tmp_path / "ours") as ours:
        save_weights(ours, back, "timm")
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, back)]
    assert configs[0] == configs[1]
    same(run(theirs, images), run(back, images))


@pytest.mark.parametrize(
    "changed",
    [
        {"q_pool": 3},
        {"patch_kernel": [7, 7]},
        {"patch_padding": [1, 1]},
        {"dim_mul": 2.0},
        {"head_mul": 2.0},
        {"mask_unit_size": [4, 4]},
        {"abs_win_pos_embed": True},
        {"sep_pos_embed": True},
        {"global_pool": "max"},
        {"img_size": 72},
    ],
)
def test_arguments_that_our_model_has_not_are_refused_by_name(changed: Mapping[str, Any]) -> None:
    config = {"architecture": "hiera_tiny_224", "model_args": {**PLAIN, "stages": (1, 1, 1, 1), **changed}}
    with pytest.raises(ConversionError, match=next(iter(changed))):
        hiera.model_of(constructor_of(config))
