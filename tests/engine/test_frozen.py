"""Whole layers frozen by their factories: the rest trains alike in every layout, where a stage trains nothing, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.assemble import assemble, grid_of
from engine.config import OptimizerConfig, TrainConfig
from engine.objectives import Supervised
from engine.run.step import Stepper
from model import Build
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import small

FIRST, LAST = ("embed", "blocks.0", "blocks.1"), ("blocks.2", "blocks.3", "head")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "a stage with nothing to train": {"pipeline_parallel_size": 2},
    "sharded gradients": {"zero_stage": 2, "bucket_mib": 0.001},
    "sharded weights": {"zero_stage": 3, "bucket_mib": 0.001, "reshard_after_forward": "always"},
}


def frozen(factory: Callable[[Build], nn.Module]) -> Callable[[Build], nn.Module]:
    return lambda build: factory(build).requires_grad_(False)


def train(
    world: World, names: tuple[str, ...], layout: dict[str, Any], **optimizer: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and norms of three steps and those of the average after them, and what this rank's weights then are, less
    what they were.
    """
    train = TrainConfig(steps=3, global_batch_size=8, micro_batch_size=4)
    config = small(
        parallel=ParallelConfig(**layout), train=train, optimizer=OptimizerConfig(**optimizer, ema_decay=0.5)
    ).resolve(world.size)
    objective = Supervised.of(config)
    layers = [replace(s, factory=frozen(s.factory)) if s.name in names else s for s in objective.layers]
    cpu = torch.device("cpu")
    objective = replace(objective, layers=tuple(layers))
    stepper = Stepper(assemble(config, grid_of(config, world, cpu), cpu, objective))
    store = stepper.assembly.store
    before = {name: value.clone() for name, value in store.local_values().items()}
    results = [stepper.train_step(batches_of(stepper, step), 1e-2) for step in range(3)]
    seen = [number for result in results for number in (result.loss, float(result.grad_norm))]
    seen.append(stepper.evaluate_average(batches_of(stepper, 3))["loss"])
    return seen, {name: value - before[name] for name, value in store.local_values().items()}


@pytest.mark.parametrize("names", [FIRST, LAST], ids=["first", "last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_frozen_stays_and_the_rest_trains_alike(layout: str, names: tuple[str, ...]) -> None:
    wanted, changes = train(World(), names, {})
    made: dict[str, Tensor] = {}
    for seen, part in run_ranks(2, train, names, LAYOUTS[layout]):
        assert seen == pytest.approx(wanted, rel=1e-5)
        made |= part
    assert made.keys() == changes.keys()
    for name, change in made.items():
        is_frozen = name.startswith(tuple(f"{layer}." for layer in names))
        assert change.any() != is_frozen, name
        torch.testing.assert_close(change, changes[name], rtol=1e-3, atol=1e-5)


NAMES = ("adamw", "adafactor", "lamb", "muon")


def train_with_each(world: World, layout: dict[str, Any]) -> list[list[float]]:
    """What `train` sees, with the second half of the layers frozen, under every optimizer."""
    return [train(world, LAST, layout, name=name)[0] for name in NAMES]


def test_every_optimizer_bears_a_stage_that_trains_nothing() -> None:
    wanted = train_with_each(World(), {})
    for seen in run_ranks(2, train_with_each, LAYOUTS["a stage with nothing to train"]):
        for ours, theirs in zip(seen, wanted, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
