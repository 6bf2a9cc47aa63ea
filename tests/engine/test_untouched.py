"""Looking changes nothing: evaluation, diagnosis, and what saving does leave training as it is, bit for bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble, grid_of
from engine.checkpoint.states import state_pieces
from engine.config import OptimizerConfig, PrecisionConfig, TrainConfig
from engine.run.finite import check_finite
from engine.run.step import Stepper, StepResult
from engine.seeing.watch import Watch
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import small

STEPS = 4  # more than the history is long


class Way(NamedTuple):
    precision: dict[str, Any]
    optimizer: str = "adamw"
    layout: dict[str, Any] = {}  # noqa: RUF012


FP8: dict[str, Any] = {"dtype": "fp8", "fp8_history": 2}
ALONE = {
    "fp32": Way({"dtype": "fp32"}, "muon"),
    "bf16": Way({"dtype": "bf16"}, "adafactor"),
    "fp16": Way({"dtype": "fp16", "loss_scale_window": 2}, "lamb"),
    "fp8": Way(FP8),
    "fp8, current scaling": Way({"dtype": "fp8", "fp8_recipe": "current"}),
}
ON_TWO = {
    "bf16, sharded weights": Way({"dtype": "bf16"}, "adafactor", {"zero_stage": 3, "bucket_mib": 0.001}),
    "fp8, two stages": Way(FP8, layout={"pipeline_parallel_size": 2}),
    "fp8, tensor ranks": Way(FP8, layout={"tensor_parallel_size": 2, "sequence_parallel": True}),
    "fp8, weights cast for each product": Way(FP8, layout={"zero_stage": 3, "bucket_mib": 0.001}),
}


def look(stepper: Stepper, step: int) -> None:
    """All that a run does between steps."""
    other = batches_of(stepper, 100 + step)
    stepper.evaluate(other)
    stepper.evaluate_average(other)
    stepper._diagnose(other)
    Watch(stepper.assembly, other, 8)()
    check_finite(stepper.assembly, step)


def train(world: World, way: Way, *, looking: bool) -> tuple[list[StepResult], dict[str, Tensor]]:
    """What each step did, and every state of this rank after them."""
    config = small(
        width=32,
        train=TrainConfig(steps=STEPS, global_batch_size=8, micro_batch_size=4),
        parallel=ParallelConfig(**way.layout),
        optimizer=OptimizerConfig(name=way.optimizer, ema_decay=0.9),  # type: ignore[arg-type]
        precision=PrecisionConfig(**way.precision),
    ).resolve(world.size)
    cpu = torch.device("cpu")
    stepper = Stepper(assemble(config, grid_of(config, world, cpu), cpu))
    results = []
    for step in range(STEPS):
        if looking:
            look(stepper, step)
        results.append(stepper.train_step(batches_of(stepper, step), 0.03))
    return results, {p.name: p.values.detach().clone() for p in state_pieces(stepper.assembly)}


def differences(world: World, ways: dict[str, Way]) -> dict[str, list[str]]:
    """What is not the same, if one looks: of each way."""
    found = {}
    for name, way in ways.items():
        (calm, expected), (results, states) = (train(world, way, looking=looking) for looking in (False, True))
        assert expected.keys() == states.keys() and len(states) > 50
        steps = [f"step {i}" for i, (a, b) in enumerate(zip(calm, results, strict=True)) if a != b]
        found[name] = steps + [key for key, value in expected.items() if not torch.equal(value, states[key])]
    return found


@pytest.mark.parametrize("name", ALONE)
def test_looking_changes_nothing(name: str) -> None:
    assert differences(World(), {name: ALONE[name]}) == {name: []}


def test_looking_changes_nothing_on_two_ranks() -> None:
    for found in run_ranks(2, differences, ON_TWO, timeout=120):
        assert found == {name: [] for name in ON_TWO}
