"""A small model, real parameters for modules that are made on the meta device, micro-batches, and places on an axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model import MicroBatch, ModelConfig
from parallel.comm import Axis, single_axis
from parallel.layout import attach_info, info_of
from parallel.random import initialise

TINY = ModelConfig(width=16, depth=2, num_heads=4, image_size=8, patch_size=2, num_classes=5)


def real(module: nn.Module, seed: int = 0) -> Any:
    """`module` with its meta parameters made real and initialised."""
    for name, meta in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(meta.shape))
        attach_info(parameter, info_of(meta))
        setattr(module.get_submodule(owner), leaf, parameter)
    initialise(module, seed)
    return module


def context_axis(ranks: int, index: int) -> Axis:
    """Of one rank among some, none of which talk to each other."""
    if ranks == 1:
        return single_axis("context")
    return Axis(name="context", ranks=tuple(range(ranks)), index=index, group=object())  # type: ignore[arg-type]


def batch_of(ids: list[int], *, training: bool = True, images: Tensor | None = None) -> MicroBatch:
    """A micro-batch of images with these sample ids, all of class 0."""
    sample_ids = torch.tensor(ids)
    weights = torch.ones(len(ids))
    return MicroBatch(images=images, labels=sample_ids * 0, sample_ids=sample_ids, weights=weights, training=training)
