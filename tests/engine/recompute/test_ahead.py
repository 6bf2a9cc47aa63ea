"""What is dropped is computed again while a rank waits: the bits are those of without, and backward finds it there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.assemble import assemble, grid_of
from engine.config import RecomputeConfig
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.plan import META, plan_memory
from engine.recompute.ahead import flops_again
from engine.recompute.regions import _Call
from engine.recompute.save_sets import save_set
from engine.recompute_choice import check_budget
from engine.run.step import Stepper
from model import build_layers
from parallel.config import ParallelConfig
from parallel.grid import Grid, planned_grid
from parallel.pipeline import Schedule
from parallel.pipeline.actions import Action, ActionKind
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import small
from tests.parity.cases import MODELS, Case
from tests.parity.climb import CPU, Climb, climb, close

STEPS = 2
Place = tuple[int, int | None]
"""A stage and micro-batch."""


@dataclass
class Ran:
    """What a rank ran again.

    Attributes:
        ahead, late: calls by R, and within backward. planned: R in the program of this rank.
    """

    climb: Climb
    ahead: Counter[Place] = field(default_factory=Counter)
    late: Counter[Place] = field(default_factory=Counter)
    planned: set[Place] = field(default_factory=set)


@contextmanager
def _watched(ran: Ran) -> Iterator[list[Stepper]]:
    steppers, again = list[Stepper](), _Call.again

    def counted(call: _Call) -> None:
        if steppers:  # else FLOPs are counted, before there are any ranks
            action = steppers[0].assembly.grid.meter.where.doing
            assert isinstance(action, Action), action
            by_r = action.kind is ActionKind.RECOMPUTE
            assert by_r == (torch._C._current_graph_task_id() < 0)
            (ran.ahead if by_r else ran.late)[action.stage, action.micro_batch] += 1
        again(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Call, "again", counted)
        yield steppers


def _run(world: World, grid: Grid, case: Case, save: str, ahead: str) -> Ran:
    config = replace(case.config(), recompute=RecomputeConfig(policy=save, ahead=ahead))  # type: ignore[arg-type]
    ran = Ran(Climb())
    with _watched(ran) as steppers:
        ran.climb = climb(world, config, steppers.append, steps=STEPS, given=grid)
    program = steppers[0].assembly.schedule.ranks[grid.pipeline.index]
    ran.planned = {(a.stage, a.micro_batch) for a in program if a.kind is ActionKind.RECOMPUTE}
    return ran


def _compare(world: World, cases: Sequence[tuple[Case, str]]) -> list[int]:
    """Calls that were run ahead in each case that goes by its program; by readiness there may be none."""
    counts = []
    for case, save in cases:
        grid = grid_of(case.config(), world, CPU)
        never, auto = (_run(world, grid, case, save, ahead) for ahead in ("never", "auto"))
        close(grid)
        assert not never.planned and not never.ahead
        assert auto.ahead + auto.late == never.late, (case, save)
        assert set(auto.ahead) <= auto.planned
        if case.policy == "static":
            assert set(auto.ahead) == auto.planned and not auto.planned & set(auto.late), (case, save)
        assert never.climb.losses == auto.climb.losses and never.climb.grad_norms == auto.climb.grad_norms
        for what in ("first_grads", "parameters"):
            for name, value in getattr(never.climb, what).items():
                assert torch.equal(value, getattr(auto.climb, what)[name]), (case, save, what, name)
        if case.policy == "static":
            counts.append(sum(auto.ahead.values()))
    return counts


def test_every_kind_of_schedule_gives_the_same_bits() -> None:
    cases = [
        (Case("parallel", pipeline=2, micro_batches=4, schedule=schedule), save)
        for schedule, save in (("1f1b", "input"), ("gpipe", "qk_norm"), ("zb_h1", "fc1"), ("interleaved", "input"))
    ]
    cases += [(Case("sequential", pipeline=2, micro_batches=4, schedule="zb_v"), "attention")]
    cases += [(replace(case, policy="ready"), save) for case, save in (cases[0], cases[2], cases[3], cases[4])]
    found = run_ranks(2, _compare, cases)
    assert all(any(counts) for counts in zip(*found, strict=True)), found


def test_with_sharded_weights_and_split_rows() -> None:
    """Two buffers for all units, full of NaN once they are given up; gathers in one order on all ranks."""
    zero = Case("parallel", pipeline=2, data=2, micro_batches=4, zero=3)
    rows = Case("kinds", pipeline=2, tensor=2, sequence_parallel=True, micro_batches=4, schedule="zb_h1")
    cases = [(zero, "input"), (rows, "input+gather")]
    cases += [(replace(case, policy="ready", schedule="interleaved"), save) for case, save in cases]
    found = run_ranks(4, _compare, cases)
    assert all(any(counts) for counts in zip(*found, strict=True)), found


@pytest.mark.parametrize("model", ["parallel", "sequential", "pyramid"])
def test_products_that_are_computed_again(model: str) -> None:
    """All of a block but its last product for `input`; something for what has no product; nothing where all is kept."""
    config = MODELS[model].resolve()
    layers = build_layers(config)
    found = {
        name: dict(
            zip([l.name for l in layers], flops_again(layers, {"blocks.1": save_set(name)}, config), strict=True)
        )
        for name in ("all", "norm", "qkv", "input")
    }
    block = next(layer for layer in layers if layer.name == "blocks.1")
    assert not any(found["all"].values())
    for flops in found.values():
        assert not any(value for name, value in flops.items() if name != "blocks.1")
    assert found["norm"]["blocks.1"] == block.flops // 50
    assert block.flops // 50 < found["qkv"]["blocks.1"] < found["input"]["blocks.1"] <= block.flops


def _planned(parallel: ParallelConfig, **recompute: Any) -> Schedule:
    config = small(parallel=parallel, recompute=RecomputeConfig(**recompute)).resolve(2)
    return assemble(config, planned_grid(config.grid_shape(2), 0), META, device_memory=1e9).schedule


def test_the_key(tmp_path: Path) -> None:
    pipeline = ParallelConfig(pipeline_parallel_size=2)
    plain = _planned(pipeline)
    assert not plain.recomputes and _planned(pipeline, policy="full", ahead="never") == plain
    assert [str(a) for a in _planned(pipeline, policy="full").recomputes] == ["0R0", "0R1"]
    assert not _planned(pipeline, policy="all, all, input, input").recomputes, "only the last stage drops anything"
    written = tmp_path / "own.csv"
    written.write_text("0F0,0F1,0B0,0R1,0B1\n1F0,1B0,1F1,1B1\n")
    by_hand = replace(pipeline, schedule=str(written))
    for ahead in ("auto", "never"):
        assert [str(a) for a in _planned(by_hand, policy="full", ahead=ahead).recomputes] == ["0R1"]
    with pytest.raises(ConfigError, match=r"own.csv has recomputes \(0R1 and so on\), but nothing is dropped: set rec"):
        _planned(by_hand)
    with pytest.raises(
        ConfigError, match=r"own.csv has recomputes \(0R1 and so on\), but recompute.policy auto places"
    ):
        config = small(parallel=by_hand, recompute=RecomputeConfig(policy="auto")).resolve(2)
        check_budget(config, config.grid_shape(2), 1e9, on_cpu=True)
    for ranks, policy, why in ((2, "none", "nothing is dropped"), (1, "full", "there is one pipeline rank")):
        layout = ParallelConfig(pipeline_parallel_size=ranks)
        config = small(parallel=layout, recompute=RecomputeConfig(policy=policy, ahead="never")).resolve(ranks)
        told = without_effect(config, config.grid_shape(ranks), "cpu", 1)
        assert [line for line in told if line.startswith(f"recompute.ahead never: {why}")], told


def test_the_plan_counts_what_lies_recomputed() -> None:
    """On the first rank: one micro-batch as large as if nothing was dropped, the other as it is kept."""

    def planned(rank: int, **recompute: Any) -> int:
        parallel = ParallelConfig(pipeline_parallel_size=2)
        config = small(parallel=parallel, recompute=RecomputeConfig(**recompute), depth=8).resolve(2)
        return plan_memory(config, config.grid_shape(2), rank, 1e9).activations

    whole, ahead, late = planned(0), planned(0, policy="full"), planned(0, policy="full", ahead="never")
    assert late < ahead < whole
    assert ahead == pytest.approx(whole / 2, rel=0.15)
    assert planned(1, policy="full") == planned(1, policy="full", ahead="never") < planned(1)
