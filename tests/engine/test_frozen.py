"""What is frozen, by `train.freeze` or by the factories of layers: found by name, and the rest trains alike.

The ladder has frozen parts in many layouts (tests/parity/cases.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.assemble import assemble, grid_of
from engine.config import OptimizerConfig, PrecisionConfig, TrainConfig
from engine.errors import ConfigError
from engine.frozen import Frozen, frozen_of
from engine.objectives import Supervised, make_objective
from engine.plan import plan_memory, states
from engine.run.step import Stepper
from model import Build
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import small

FIRST, LAST = ("embed", "blocks.0", "blocks.1", "blocks.2"), ("blocks.3", "head")  # as two stages are cut
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


# -- by pattern --------------------------------------------------------------------------------------------------------


def frozen_by(*patterns: str, **model: Any) -> Frozen:
    config = small(train=TrainConfig(steps=1, global_batch_size=8, freeze=patterns), depth=11, **model).resolve(1)
    return frozen_of(config, make_objective(config).layers)


def test_a_pattern_is_of_a_whole_name_or_of_its_beginning() -> None:
    names = frozen_by("blocks.1", "*.qkv.bias", "embed", "head.fc.w*t").names
    layers = {name.rpartition(".")[0] if name.startswith("blocks.10") else name.split(".")[0] for name in names}
    assert layers == {"embed", "blocks", "head", "blocks.10.attn.qkv"}
    assert {name for name in names if name.startswith("head")} == {"head.fc.weight"}
    assert sum(name.startswith("blocks.1.") for name in names) == 12
    assert frozen_by().names == frozenset()


def test_costs_follow_what_is_frozen() -> None:
    assert frozen_by().passes == (3,) * 13
    assert frozen_by("embed", "blocks.0", "blocks.2", "head").passes == (1, 1, 3, 2, *(3,) * 8, 2)
    assert frozen_by("embed.*", "blocks.[0-9]").front == 11
    assert frozen_by("blocks.10.*.bias", "embed.weight").passes == (3,) * 13


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("embed", "block.3"), "train.freeze holds 'block.3', .*nearest are blocks.3, "),
        (("embd",), "nearest are embed"),
        (("embed", "head", "blocks"), "leave something to train"),
        (("",), "train.freeze holds ''"),
        (("*",), r"freezes all \d+ parameters"),
    ],
)
def test_what_fits_nothing_or_all_is_refused(patterns: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        frozen_by(*patterns)


def held(world: World, freeze: tuple[str, ...], layout: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Bytes by what they hold, and how many tensors this rank is sent back."""
    train = TrainConfig(steps=1, global_batch_size=8, micro_batch_size=4, freeze=freeze)
    optimizer = OptimizerConfig(ema_decay=0.9)
    precision = PrecisionConfig(dtype="bf16")
    config = small(parallel=ParallelConfig(**layout), train=train, optimizer=optimizer, precision=precision)
    config = config.resolve(world.size)
    cpu = torch.device("cpu")
    a = assemble(config, grid_of(config, world, cpu), cpu)
    stepper = Stepper(a)
    a.grid.meter.reset()
    stepper.train_step(batches_of(stepper, 0), 1e-2)
    return states(a), a.grid.meter.calls["recv"]


def test_what_is_frozen_has_weights_and_nothing_else() -> None:
    (front, received), (back, _) = run_ranks(2, held, FIRST, {"pipeline_parallel_size": 2})
    assert received == 0
    assert front.pop("weights") > 0 and set(front.values()) == {0}, front
    assert all(back[what] for what in ("masters", "gradients", "optimizer state", "weight average"))


def test_diagnosis_and_plan_bear_a_frozen_front() -> None:
    train = TrainConfig(steps=1, global_batch_size=8, micro_batch_size=4, freeze=FIRST)
    config = small(train=train, parallel=ParallelConfig(pipeline_parallel_size=2)).resolve(2)
    shape = config.grid_shape(2)
    plan = plan_memory(config, shape, 0, 2.0**33)
    whole = plan_memory(replace(config, train=replace(train, freeze=())), shape, 0, 2.0**33)
    assert plan.activations < whole.activations and plan.states["gradients"] == 0 < whole.states["gradients"]
    config = replace(config, parallel=ParallelConfig()).resolve(1)
    cpu = torch.device("cpu")
    stepper = Stepper(assemble(config, grid_of(config, World(), cpu), cpu))
    with torch.no_grad():
        stepper.assembly.parameters()["blocks.0.mlp.fc1.weight"].fill_(float("nan"))
    result = stepper.train_step(batches_of(stepper, 0), 1e-2)
    assert result.culprit is not None and "blocks.0" in result.culprit
