"""open_clip's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from tools.convert.libraries import library
from tools.convert.runners import Outputs


def run(path: Path, images: Tensor, texts: Tensor | None = None) -> Outputs:
    """Of a folder with `open_clip_config.json`: a whole model by its loader, a tower alone by the class of towers."""
    folder = path if path.is_dir() else path.parent
    library("open_clip")
    if texts is not None:
        return _both(_whole(folder).eval(), images, texts)
    tower = _whole(folder).visual if _has_text(folder) else _alone(folder)
    tower.eval()
    if hasattr(tower, "trunk"):
        return _of_timm(tower, images)
    tower.output_tokens = False
    with torch.no_grad():
        logits = tower(images)
        tower.proj = None
        return Outputs(tower(images), logits)


def _both(model: Any, images: Tensor, texts: Tensor) -> Outputs:
    if hasattr(model.visual, "trunk"):
        images = _filled(model.visual, images)
    with torch.no_grad():
        logits = model.get_logits(images, texts)[0]
        return Outputs(model.encode_image(images), logits, model.encode_text(texts))


def _filled(tower: Any, images: Tensor) -> Tensor:
    """For a tower of timm's, which leaves out what does not fill a patch: zeros, here."""
    rows, cols = tower.trunk.patch_embed.img_size
    return F.pad(images, (0, cols - images.shape[3], 0, rows - images.shape[2]))


def _of_timm(tower: Any, images: Tensor) -> Outputs:
    images = _filled(tower, images)
    with torch.no_grad():
        features = tower.trunk.forward_head(tower.trunk.forward_features(images), pre_logits=True)
        logits = tower(images)
    projected = tower.trunk.num_classes or len(tower.head)
    return Outputs(features, logits if projected else None)


def _has_text(folder: Path) -> bool:
    return "text_cfg" in json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]


def _whole(folder: Path) -> Any:
    return library("open_clip.factory").create_model(f"local-dir:{folder}")


def _alone(folder: Path) -> Any:
    cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    tower = library("open_clip.model")._build_vision_tower(
        cfg["embed_dim"], cfg["vision_cfg"], cfg.get("quick_gelu", False)
    )
    with safe_open(folder / "open_clip_model.safetensors", framework="pt") as file:
        tower.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return tower
