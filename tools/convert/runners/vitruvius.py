"""This program's own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, VisionTransformer
from model.formats.api import open_weights
from model.formats.weights import Weights
from tools.convert.runners import Outputs


def run(path: Path, images: Tensor) -> Outputs:
    """Of a checkpoint of any kind that this program reads."""
    with open_weights(path) as weights:
        return run_weights(weights, images)


@torch.inference_mode()
def run_weights(weights: Weights, images: Tensor, dtype: torch.dtype | None = None) -> Outputs:
    """Of weights that are open.

    Args:
        dtype: that they are rounded to before; the model computes in fp32.
    """
    config = weights.description.model

    def read(name: str) -> Tensor:
        return weights.read(name).to(dtype or torch.float32).float()

    whole = {name: read(name) for name in weights.tensors}
    logits = None
    if config.num_classes:
        logits = _model(config, whole)(images)
        config = replace(config, num_classes=0, head_bias=None, classifier_bias=None).resolve()
        whole = {name: x for name, x in whole.items() if not name.startswith("head.fc")}
    return Outputs(_model(config, whole)(images), logits)


def _model(config: ModelConfig, whole: Mapping[str, Tensor]) -> VisionTransformer:
    model = VisionTransformer(config, seed=None).eval()
    model.load(whole)
    return model
