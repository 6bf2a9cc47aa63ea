"""timm's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.formats.api import open_weights
from model.formats.timm.format import Timm
from tools.convert.libraries import library
from tools.convert.runners import Outputs


def run(path: Path, images: Tensor) -> Outputs:
    """Of a folder, by its config.json, or of a bare file, by what this program makes of it."""
    model = load(path).eval().float()
    with torch.no_grad():
        features = model.forward_features(_whole(model, images))
        logits = model.forward_head(features) if model.num_classes else None
        return Outputs(model.forward_head(features, pre_logits=True), logits)


def load(path: Path) -> Any:
    """timm's model at a path."""
    timm = library("timm")
    if (path / "config.json").is_file():
        return timm.create_model(f"local-dir:{path.resolve()}", pretrained=True)
    with open_weights(path, "timm") as weights:
        config = Timm().files(weights.description)["config.json"]
    return timm.create_model(config["architecture"], **config["model_args"], checkpoint_path=str(path))


def _whole(model: Any, images: Tensor) -> Tensor:
    """With the rows and columns that a patch embedding drops, where the image is no multiple of the patch."""
    rows, cols = getattr(model.patch_embed, "img_size", images.shape[2:])
    return F.pad(images, (0, cols - images.shape[3], 0, rows - images.shape[2]))
