"""The state of a run as pieces: in every layout they make up the same logical tensors, and say truly who holds what."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble, grid_of
from engine.checkpoint.states import state_pieces
from engine.config import OptimizerConfig, PrecisionConfig, TrainConfig
from engine.objectives import Supervised
from engine.run.step import Stepper
from parallel.config import ParallelConfig
from parallel.layout import TensorLayout
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import small
from tests.engine.test_frozen import frozen

STEPS = 2
# Five heads, which two ranks share unevenly; sides on both sides of Adafactor's 32. No parameter whose gradient is zero
# but for rounding (a key bias), which optimizers would blow up.
_BOTH: dict[str, Any] = {"block": "parallel", "bias": False, "pool": "gap"}
MODEL = _BOTH | {"width": 40, "num_heads": 5, "mlp_dim": 48, "qk_norm": True}
FP8_MODEL = _BOTH | {"width": 32, "num_heads": 4, "mlp_dim": 64}


class Run(NamedTuple):
    optimizer: str
    dtype: str
    layout: dict[str, Any]


T2, SP = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}
RUNS = {
    "adamw, copies": Run("adamw", "fp16", T2 | {"sequence_parallel": False}),
    "adamw, sharded weights": Run("adamw", "bf16", SP | {"zero_stage": 3, "bucket_mib": 0.001}),
    "adafactor, sharded state": Run("adafactor", "fp32", SP | {"zero_stage": 1}),
    "muon, sharded gradients": Run("muon", "fp32", {"pipeline_parallel_size": 2, "zero_stage": 2, "schedule": "zb_v"}),
    "lamb, two stages": Run("lamb", "fp32", SP | {"pipeline_parallel_size": 2}),
    "fp8": Run("adamw", "fp8", T2 | {"zero_stage": 3}),
}


class Held(NamedTuple):
    """A piece, as it is sent to the test."""

    name: str
    layout: TensorLayout
    start: int
    stop: int
    own: slice
    values: Tensor
    ranks: tuple[int, ...]  # global ranks of its axis
    holders: frozenset[tuple[int, int, int, int]]  # global rank, tensor index, start, stop


def pieces_after_training(world: World, run: Run) -> list[Held]:
    """Embedding frozen, a moving average kept."""
    config = small(
        **(FP8_MODEL if run.dtype == "fp8" else MODEL),
        train=TrainConfig(steps=STEPS, global_batch_size=8, micro_batch_size=2),
        parallel=ParallelConfig(**run.layout if world.size > 1 else {}),
        optimizer=OptimizerConfig(name=run.optimizer, ema_decay=0.5),  # type: ignore[arg-type]
        precision=PrecisionConfig(dtype=run.dtype),
    ).resolve(world.size)  # fmt: skip
    objective = Supervised.of(config)
    first, *rest = objective.layers
    objective = replace(objective, layers=(replace(first, factory=frozen(first.factory)), *rest))
    grid = grid_of(config, world, torch.device("cpu"))
    stepper = Stepper(assemble(config, grid, torch.device("cpu"), objective))
    for step in range(STEPS):
        stepper.train_step(batches_of(stepper, step), 1e-3)
    found = [
        Held(
            p.name, p.layout, p.start, p.stop, p.own, p.values.detach().float().clone(), tuple(p.axis.ranks),
            frozenset((p.axis.ranks[h.rank], h.layout.index, h.start, h.stop) for h in p.holders),
        )
        for p in state_pieces(stepper.assembly)
    ]  # fmt: skip
    grid.close()
    return found


def all_runs(world: World) -> dict[str, list[Held]]:
    return {name: pieces_after_training(world, run) for name, run in RUNS.items()}


def whole(pieces: list[Held]) -> dict[str, Tensor]:
    """Logical tensors from what each rank accounts for; every element must be there once."""
    values: dict[str, Tensor] = {}
    for piece in pieces:
        full, count = (
            values.setdefault(f"{piece.name}{what}", torch.zeros(piece.layout.shape)) for what in ("", " count")
        )
        for out, part in ((full, piece.values), (count, torch.ones_like(piece.values))):
            local = torch.zeros(piece.layout.local_shape)
            local.view(-1)[piece.start : piece.stop][piece.own] = part[piece.own]
            there = torch.zeros(piece.layout.shape)
            piece.layout.place(there, local)
            out += there
    for name in [name for name in values if name.endswith(" count")]:
        assert (values.pop(name) == 1).all(), name
    return values


@pytest.fixture(scope="module")
def held() -> list[dict[str, list[Held]]]:
    return run_ranks(4, all_runs, timeout=120)


@pytest.mark.parametrize("name", RUNS)
def test_pieces_make_up_what_one_process_has(name: str, held: list[dict[str, list[Held]]]) -> None:
    alone, ours = whole(pieces_after_training(World(), RUNS[name])), whole([p for rank in held for p in rank[name]])
    assert ours.keys() == alone.keys()
    kinds = {key.partition("/")[0] for key in ours}
    assert {"weights", "average", "optimizer.steps", "average.updates"} <= kinds and len(kinds) >= 6
    assert ours["optimizer.steps"] == ours["average.updates"] == STEPS
    # what lies in a wrong place is off by its own size; 16 bits and less round differently in another layout
    far = 1e-3 if RUNS[name].dtype == "fp32" else 0.3
    for key, value in ours.items():
        distance = (value - alone[key]).norm() / alone[key].norm().clamp(min=1e-30)
        assert distance <= far, f"{key}: {distance}"


@pytest.mark.parametrize("name", RUNS)
def test_pieces_say_who_else_holds_them(name: str, held: list[dict[str, list[Held]]]) -> None:
    truly: dict[tuple[str, tuple[int, ...]], Counter[tuple[int, int, int, int]]] = {}
    for rank, pieces in enumerate(held):
        for p in pieces[name]:
            truly.setdefault((p.name, p.ranks), Counter())[rank, p.layout.index, p.start, p.stop] += 1
    assert all(count == 1 for found in truly.values() for count in found.values())
    for p in (p for rank in held for p in rank[name]):
        assert p.holders == set(truly[p.name, p.ranks]), p.name
