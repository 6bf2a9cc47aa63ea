"""A configuration that trains in milliseconds, and its flags."""

from __future__ import annotations

from typing import Any

from data import DataConfig
from engine.config import Config, LogConfig, TrainConfig
from model import ModelConfig
from parallel.config import ParallelConfig

MODEL: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "num_classes": 10,
    "width": 16,
    "depth": 4,
    "num_heads": 4,
}
GROUPS: dict[str, Any] = {
    "data": DataConfig(kind="synthetic", size=32),
    "train": TrainConfig(steps=1, global_batch_size=8),
    "log": LogConfig(tensorboard=False),
}


def small(*, tensor: int = 1, **changes: Any) -> Config:
    """The configuration with some groups (by their objects) or keys of the model changed."""
    model = {key: changes.pop(key) for key in list(changes) if key in ModelConfig.__dataclass_fields__}
    groups = {"parallel": ParallelConfig(tensor_parallel_size=tensor)} | GROUPS | changes
    return Config(model=ModelConfig(**MODEL | model), **groups)


def flags(**changes: str) -> list[str]:
    """The same as flags; dots in names of changes are written as two underscores."""
    given = {f"model.{key}": str(value) for key, value in MODEL.items()}
    given |= {"data.kind": "synthetic", "data.size": "32", "train.steps": "1", "train.global_batch_size": "8"}
    given |= {"log.tensorboard": "false"} | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in given.items() for part in (f"--{key}", value)]
