"""Teachers for the ladder: checkpoints of random weights, written once for all processes of a machine's user."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.distillation import DistillationConfig, TeacherConfig
from model import ModelConfig, VisionTransformer
from model.formats.base import ConversionError

_MODELS: dict[str, ModelConfig] = {}


def teacher(model: ModelConfig, **keys: Any) -> TeacherConfig:
    """One of this model; its checkpoint is there once `with_teachers` has seen it."""
    name = blake2b(repr(model).encode(), digest_size=8).hexdigest()
    path = str(Path(tempfile.gettempdir()) / f"vitruvius-teachers-{os.getuid()}" / name)
    _MODELS[path] = model
    return TeacherConfig(path=path, **keys)


def with_teachers(keys: DistillationConfig, teachers: tuple[TeacherConfig, ...]) -> DistillationConfig:
    """The keys, with teachers whose checkpoints are there."""
    for path in (Path(of.path) for of in teachers):
        if not path.exists():
            try:
                _made(_MODELS[str(path)]).save_pretrained(path)
            except (ValueError, ConversionError):
                if not path.exists():  # else another process was quicker
                    raise
    return replace(keys, teachers=teachers) if len(teachers) > 1 else _of_one(keys, teachers[0])


def _of_one(keys: DistillationConfig, of: TeacherConfig) -> DistillationConfig:
    return replace(
        keys, teacher=of.path, teacher_image_size=of.image_size, teacher_mean=of.mean, teacher_std=of.std,
        teacher_dtype=of.dtype,
    )  # fmt: skip


def _made(config: ModelConfig) -> VisionTransformer:
    """Of opinions: logits as large as those of a trained model."""
    model = VisionTransformer(config, seed=7)

    def louder(weight: Tensor) -> None:
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) / 4)

    with torch.no_grad():
        louder(model.get_parameter("head.fc.weight"))
    return model
