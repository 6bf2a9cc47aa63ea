"""Copies that drift apart are noticed, and named; copies that do not are not."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.checkpoint.states import state_pieces
from engine.config import OptimizerConfig, PrecisionConfig, TrainConfig
from engine.errors import DriftError
from engine.run.replicas import check_replicas
from engine.run.step import Stepper
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import small

T2: dict[str, Any] = {"tensor_parallel_size": 2}
SHARDED: dict[str, Any] = {"zero_stage": 3, "bucket_mib": 0.001}


class Run(NamedTuple):
    """A layout of four ranks; data ranks are what is left."""

    layout: dict[str, Any]
    optimizer: str = "adamw"
    dtype: str = "fp32"


def stepper_of(world: World, run: Run) -> Stepper:
    config = small(
        width=40, num_heads=5, mlp_dim=48, qk_norm=run.dtype != "fp8",  # five heads: tensor ranks are uneven
        parallel=ParallelConfig(**run.layout), precision=PrecisionConfig(dtype=run.dtype),  # type: ignore[arg-type]
        train=TrainConfig(steps=9, global_batch_size=8),
        optimizer=OptimizerConfig(name=run.optimizer, ema_decay=0.9),  # type: ignore[arg-type]
    ).resolve(world.size)  # fmt: skip
    cpu = torch.device("cpu")
    return Stepper(assemble(config, grid_of(config, world, cpu), cpu))


# -- no false alarm ----------------------------------------------------------------------------------------------------

SOUND = {
    "copies, adamw": Run(T2),
    "context, adafactor": Run({"context_parallel_size": 2, "zero_stage": 1}, "adafactor", "bf16"),
    "tensor and rows, lamb": Run(T2 | {"sequence_parallel": False, "zero_stage": 1}, "lamb"),
    "gradients, muon": Run(T2 | {"zero_stage": 2}, "muon"),
    "stages, muon": Run({"pipeline_parallel_size": 2}, "muon", "fp16"),
    "weights, adafactor": Run(T2 | SHARDED, "adafactor"),
    "weights, bf16": Run(T2 | SHARDED, "adamw", "bf16"),
    "four tensor ranks": Run({"tensor_parallel_size": 4}, "lamb", "bf16"),
    "fp8": Run(T2 | {"zero_stage": 1}, "adamw", "fp8"),
}


def alarms(world: World, runs: dict[str, Run]) -> dict[str, str]:
    """What is said of each run in which something is."""
    found = {}
    for name, run in runs.items():
        stepper = stepper_of(world, run)
        try:
            for step in range(4):
                check_replicas(stepper.assembly, step)
                assert not stepper.train_step(batches_of(stepper, step), 1e-2).skipped
                check_replicas(stepper.assembly, step)
        except DriftError as error:
            found[name] = str(error)
    return found


def test_copies_that_stay_copies_raise_no_alarm() -> None:
    assert run_ranks(4, alarms, SOUND, timeout=120) == [{}] * 4


# -- one bit -----------------------------------------------------------------------------------------------------------


class Flip(NamedTuple):
    """What is changed, on which rank: of the piece of state of this name, or of the weights that the model computes
    with; and what is then said. Ranks are tensor ranks 0 and 1 of data rank 0, then of data rank 1.
    """

    run: Run
    rank: int
    name: str
    said: tuple[str, ...]


QKV, NORM = "blocks.1.attn.qkv.weight", "blocks.2.norm1.weight"
BIAS = "blocks.3.mlp.fc2.bias"
COPIED = Run(T2)
FLIPS = {
    "weight of data rank": Flip(COPIED, 2, f"weights/{QKV}", (f"weights of {QKV}", "between rank 0 and rank 2")),
    "weight of tensor rank": Flip(COPIED, 1, f"weights/{NORM}", (f"weights of {NORM}", "rank 1 from", "ranks 0, 2, 3")),
    "moment": Flip(COPIED, 3, f"optimizer.exp_avg_sq/{NORM}", (f"optimizer.exp_avg_sq of {NORM}", "on rank 3 from")),
    "average": Flip(COPIED, 0, f"average/{QKV}", (f"average of {QKV}", "between rank 0 and rank 2")),
    "sharded": Flip(Run(T2 | {"zero_stage": 2}), 2, f"model/{NORM}", (f"weights of {NORM}", "rank 2 from", "0, 1, 3")),
    "rounded": Flip(Run(T2, dtype="bf16"), 3, f"model/{QKV}", (f"weights of {QKV}", "rank 1 and rank 3")),
    "master": Flip(Run(T2, dtype="bf16"), 3, f"weights/{QKV}", (f"masters of {QKV}", "rank 1 and rank 3")),
    "scale": Flip(Run({}, dtype="fp8"), 1, "", ("fp8 of blocks.0", "on rank 1 from")),
    "moments in uneven shards": Flip(
        Run(T2 | {"zero_stage": 1, "sequence_parallel": False}), 3, f"optimizer.exp_avg/{BIAS}",
        (f"optimizer.exp_avg of {BIAS}", "rank 2 and rank 3"),
    ),
    "at stage 3": Flip(
        Run(T2 | SHARDED | {"sequence_parallel": False}), 2, f"weights/{NORM}",
        (f"weights of {NORM}", "rank 2 and rank 3"),
    ),
}  # fmt: skip


def array(a: Assembly, name: str) -> Tensor | None:
    """What is held here under a name."""
    if name.startswith("model/"):
        return a.parameters()[name.removeprefix("model/")].data.view(-1)
    if name:
        return next((piece.values for piece in state_pieces(a) if piece.name == name), None)
    assert a.fp8 is not None
    return next(iter(a.fp8.states.values())).history[0]


def flipped(world: World, flips: dict[str, Flip]) -> dict[str, str]:
    """What is said of each flip."""
    said = {}
    for name, flip in flips.items():
        stepper = stepper_of(world, flip.run)
        for step in range(2):
            stepper.train_step(batches_of(stepper, step), 1e-2)
        check_replicas(stepper.assembly, 2)
        held = array(stepper.assembly, flip.name)
        if world.rank == flip.rank:
            assert held is not None
            held[:1].view(torch.uint8)[0] ^= 1  # the lowest bit of the mantissa
        try:
            check_replicas(stepper.assembly, 2)
        except DriftError as error:
            said[name] = str(error)
    return said


@pytest.fixture(scope="module")
def told() -> list[dict[str, str]]:
    return run_ranks(4, flipped, FLIPS, timeout=120)


@pytest.mark.parametrize("name", FLIPS)
def test_one_bit_is_noticed_and_named_on_every_rank(name: str, told: list[dict[str, str]]) -> None:
    for said in told:
        assert "step 2" in said[name]
        assert all(words in said[name] for words in FLIPS[name].said), said[name]
