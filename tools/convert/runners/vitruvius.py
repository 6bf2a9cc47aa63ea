"""This program's own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model import ImageText, ModelConfig, VisionTransformer
from model.formats.api import open_weights
from model.formats.weights import Weights
from tools.convert.runners import Outputs


def run(path: Path, images: Tensor, texts: Tensor | None = None) -> Outputs:
    """Of a checkpoint of any kind that this program reads."""
    with open_weights(path, whole=texts is not None) as weights:
        return run_weights(weights, images, texts)


@torch.inference_mode()
def run_weights(
    weights: Weights, images: Tensor, texts: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Outputs:
    """Of weights that are open.

    Args:
        texts: of two towers, tokens. dtype: that weights are rounded to before; the model computes in fp32.
    """
    config = weights.description.model

    def read(name: str) -> Tensor:
        return weights.read(name).to(dtype or torch.float32).float()

    whole = {name: read(name) for name in weights.tensors}
    if texts is not None:
        return _both(weights, whole, images, texts)
    logits = None
    if config.num_classes:
        logits = _model(config, whole)(images)
        config = replace(config, num_classes=0, head_bias=None, classifier_bias=None).resolve()
        whole = {name: x for name, x in whole.items() if not name.startswith("head.fc")}
    return Outputs(_model(config, whole)(images), logits)


def _both(weights: Weights, whole: Mapping[str, Tensor], images: Tensor, texts: Tensor) -> Outputs:
    model = ImageText.described(weights.description, path=weights.path).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(whole[name])
    scale, bias = model(images, texts[: len(images)])[2:]
    left, right = model.encode_image(images), model.encode_text(texts)
    logits = scale * F.normalize(left, dim=1) @ F.normalize(right, dim=1).T + bias
    return Outputs(left, logits, right)


def _model(config: ModelConfig, whole: Mapping[str, Tensor]) -> VisionTransformer:
    model = VisionTransformer(config, seed=None).eval()
    model.load(whole)
    return model
