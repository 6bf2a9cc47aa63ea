"""What all programs of `tools.benchmark.peer_programs` are given alike: numbers, initial weights, images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.assemble import placement_of
from engine.config import Config
from engine.device import set_matmul
from engine.frozen import frozen_of
from engine.objectives import make_objective
from model import VisionTransformer
from tools.benchmark.eager_vit import EagerSizes, EagerViT, name_in_vitruvius
from tools.benchmark.peer_programs import Task

_LR = 1e-4
_DISTINCT = 2  # batches that the steps go through in turn


def make_task(config: Config, shares: int, flags: Sequence[str], folder: Path) -> Task:
    """What all programs train; weights and images are files in `folder`. shares: data-parallel ranks."""
    sizes = EagerSizes.of(config.model.sizes)
    _save_weights(config, sizes, folder / "weights.npz")
    _save_batches(config, shares, folder / "batches.npz")
    return Task(
        program="",
        sizes=asdict(sizes),
        dtype=config.precision.dtype,
        matmul=set_matmul(config.precision, torch.device("cpu")),
        lr=_LR,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        weights=str(folder / "weights.npz"),
        batches=str(folder / "batches.npz"),
        shares=shares,
        distinct=_DISTINCT,
        flags=list(flags),
        settings={},
    )


def pipeline_settings(config: Config, ranks: int) -> dict[str, Any]:
    """Of the engine's pipeline of `ranks`, what another needs to be cut alike."""
    count = config.num_micro_batches(config.grid_shape(ranks))
    schedule = config.pipeline(config.grid_shape(ranks)).schedule(count)
    layers = make_objective(config).layers
    placement = placement_of(config, layers, frozen_of(config, layers).passes, schedule)
    return {
        "schedule": config.parallel.schedule,
        "virtual_stages": schedule.num_stages // ranks,
        "micro_batches": count,
        "cut": [(layers.start, layers.stop) for layers in placement.layers],
    }


def _save_weights(config: Config, sizes: EagerSizes, file: Path) -> None:
    """The engine's initial weights, by their names in EagerViT."""
    ours = dict(VisionTransformer(config.model, seed=config.train.seed).named_parameters())
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in EagerViT(sizes).named_parameters()}
    assert {name_in_vitruvius(name) for name in wanted} == set(ours)
    arrays = {name: ours[name_in_vitruvius(name)].detach().view(shape).numpy() for name, shape in wanted.items()}
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _save_batches(config: Config, shares: int, file: Path) -> None:
    """Random images and labels, cut into shares."""
    sizes, generator = config.model.sizes, torch.Generator().manual_seed(config.train.seed)
    share = config.train.global_batch_size // shares
    arrays: dict[str, Any] = {}
    for number in range(_DISTINCT):
        for rank in range(shares):
            images = torch.randn(share, sizes.channels, *sizes.image, generator=generator)
            labels = torch.randint(sizes.classes, (share,), generator=generator)
            arrays |= {f"images_{number}_{rank}": images.numpy(), f"labels_{number}_{rank}": labels.numpy()}
    np.savez(file, **arrays)
