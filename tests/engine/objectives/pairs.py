"""A small configuration of objective contrastive."""

from __future__ import annotations

from typing import Any

from engine.config import Config
from model import TextConfig
from tests.engine.small import small

TEXT = TextConfig(width=16, depth=1, num_heads=4, context_length=8)


def config_of(world: int = 1, **changes: Any) -> Config:
    groups = {"objective": "contrastive", "text": TEXT, "num_classes": None} | changes
    return small(**groups).resolve(world)
