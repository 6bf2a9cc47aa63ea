"""`recompute.policy: auto`: within the budget, less again the larger it is, and refused with the least that does."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from data import DataConfig
from engine.assemble import assemble
from engine.assembly import Assembly
from engine.config import Config, RecomputeConfig
from engine.plan import plan_memory
from engine.recompute.save_sets import save_set
from engine.recompute_choice import (
    Choice,
    TooLittleError,
    check_budget,
    choose,
    settled,
)
from engine.run.step import Stepper
from parallel.grid import Grid, GridShape, make_grid
from parallel.process_group import World
from tests.parity.cases import Case
from tools.benchmark.bench import stream_of

MEMORY = 2.0**30
LAYOUTS: list[dict[str, Any]] = [
    {"model": "swin", "micro_batches": 2},
    {"model": "parallel", "depth": 12, "pipeline": 2, "micro_batches": 4, "batch": 64},
    {"model": "sequential", "depth": 5, "pipeline": 2, "schedule": "zb_v", "micro_batches": 4, "precision": "bf16"},
    {"model": "parallel", "tensor": 2, "pipeline": 2, "schedule": "zb_h1", "micro_batches": 4, "zero": 3, "data": 2},
]


def asking(config: Config, budget: int) -> Config:
    return replace(config, recompute=RecomputeConfig(policy="auto", memory_budget=budget))


def within(config: Config, shape: GridShape, budget: int) -> Choice:
    return choose(asking(config, budget), shape, MEMORY, again, on_cpu=True, passes=lambda layer: 0.02)


def again(layer: str, of: str) -> float:
    """Seconds, longer for what drops more."""
    return 0.001 * len(save_set(of).drops)


def check(config: Config, shape: GridShape, budget: int) -> None:
    check_budget(asking(config, budget), shape, MEMORY, on_cpu=True)


def test_a_run_keeps_what_was_chosen() -> None:
    """With times measured here, the bits of `none`."""
    case = Case("sequential", micro_batches=2)
    world, device = World(), torch.device("cpu")
    grid = make_grid(case.config().grid_shape(1), world)
    _, kept = train(case.config(), grid)
    most = max(within(case.config(), grid.shape, 2**40).peaks)
    config, choice = settled(asking(case.config(), most - 2**16), grid, device, MEMORY)
    assert choice is not None and f"chosen within {(most - 2**16) / 2**20:,.1f} MiB" in choice.describe()
    assert choice.pass_seconds == pytest.approx(choice.busy[0]) and choice.bubble == 0
    assembly, found = train(config, grid)
    assert found == kept
    assert assembly.recompute is not None and sum(assembly.recompute.ran_again.values()) > 0


def train(config: Config, grid: Grid) -> tuple[Assembly, list[tuple[float, float]]]:
    """Losses and gradient norms of two steps."""
    assembly = assemble(replace(config, data=DataConfig(kind="synthetic", size=32)), grid, torch.device("cpu"))
    stepper, steps = Stepper(assembly), islice(stream_of(assembly).steps(0), 2)
    return assembly, [(r.loss, r.grad_norm) for r in (stepper.train_step(batches, 1e-3) for batches in steps)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout['model']}-{layout.get('schedule', '')}")
def test_within_the_budget_and_least_again(layout: dict[str, Any]) -> None:
    case = Case(**layout)
    shape = case.config().grid_shape(case.ranks)
    config = case.config()
    unbounded = within(config, shape, 2**40)
    assert max(unbounded.seconds) == 0
    with pytest.raises(TooLittleError, match="needs") as refused:
        within(config, shape, 1)
    least = refused.value.smallest
    for refuse in (within, check):
        with pytest.raises(TooLittleError, match=f"give recompute.memory_budget {least},"):
            refuse(config, shape, least - 1)
    check(config, shape, least)
    most = max(unbounded.peaks)
    budgets = [least, *(least + (most - least) * i // 5 for i in range(1, 5)), most]
    found = [within(config, shape, budget) for budget in budgets]
    for choice, budget in zip(found, budgets, strict=True):
        assert max(choice.peaks) <= budget == choice.budget
    for tight, wide in pairwise(found):
        assert tight.step >= wide.step
    assert sum(found[0].seconds) > 0 == max(found[-1].seconds)
    assert found[-1].busy == unbounded.busy
    apart = shape.world_size // shape.pipeline
    plans = [plan_memory(found[1].config, shape, rank * apart, MEMORY, on_cpu=True) for rank in range(shape.pipeline)]
    assert tuple(plan.peak for plan in plans) == found[1].peaks


def test_a_budget_covers_what_a_contrastive_loss_holds_of_a_step() -> None:
    case = Case("pairs", micro_batches=2)
    config, shape = case.config(), case.config().grid_shape(1)
    with pytest.raises(TooLittleError) as refused:
        within(config, shape, 1)
    assert max(within(config, shape, refused.value.smallest).peaks) == refused.value.smallest


def test_what_no_device_of_that_size_can_hold_is_not_told_to_be_its_budget() -> None:
    case = Case("sequential", batch=18, micro_batches=2)
    config = replace(case.config(), recompute=RecomputeConfig(policy="auto"))
    with pytest.raises(TooLittleError, match=r"give devices with more memory, train\.micro_batch_size 3, "):
        check_budget(config, case.config().grid_shape(1), 2.0**10, on_cpu=True)


def test_host_memory_is_taken_where_that_is_asked_for_and_quicker() -> None:
    """By a link that takes no time least memory suffices, by a slow one nothing is sent but what must be."""
    case = Case("sequential", depth=8, micro_batches=2, batch=64)
    shape, config = case.config().grid_shape(case.ranks), case.config()
    config = replace(config, recompute=replace(config.recompute, policy="auto"))
    offload = replace(config, recompute=replace(config.recompute, offload="auto"))

    def chosen(config: Config, budget: int, rate: float = 1.0) -> Choice:
        asked = replace(config, recompute=replace(config.recompute, memory_budget=budget))
        return choose(
            asked, shape, MEMORY, again, on_cpu=False, passes=lambda layer: 0.02, copies=lambda _, count: count / rate
        )

    with pytest.raises(TooLittleError) as refused:
        chosen(config, 1)
    least = refused.value.smallest
    with pytest.raises(TooLittleError) as refused:
        chosen(offload, 1)
    assert refused.value.smallest < least
    middle = least + (max(chosen(config, 2**40).peaks) - least) // 3
    for budget in (least, middle):
        found = [chosen(offload, budget, rate) for rate in (1e30, 1e8, 1e3)]
        never = chosen(config, budget)
        assert all(max(choice.peaks) <= budget for choice in found)
        assert max(found[0].busy) <= max(found[1].busy) <= max(found[2].busy) == max(never.busy)
        assert max(found[0].busy) < max(never.busy) and any(
            "+offload" in name for name in found[0].config.recompute.policy
        )
        assert found[2].config == never.config
        assert found[0].config.resolve(1) == found[0].config


def test_stages_are_cut_by_times_and_by_the_budget() -> None:
    """A head that takes as long as nine other layers; less and less memory; a cut by hand, which stays."""
    case = Case("parallel", depth=12, pipeline=2, micro_batches=4, batch=64)
    config, shape = case.config(), case.config().grid_shape(case.ranks)

    def chosen(budget: int, config: Config = config) -> Choice:
        asked = asking(config, budget)
        passes = {"head": 0.9}
        return choose(
            asked, shape, MEMORY, again, on_cpu=True, passes=lambda layer: passes.get(layer, 0.1)
        )  # fmt: skip

    free = chosen(2**40)
    assert free.config.parallel.layers_per_stage == (11, 3)
    tight = chosen(free.peaks[0] * 2 // 3)
    assert max(tight.peaks) <= free.peaks[0] * 2 // 3 and max(tight.busy) > max(free.busy)
    by_hand = replace(config, parallel=replace(config.parallel, layers_per_stage=(4, 10)))
    assert chosen(2**40, by_hand).config.parallel.layers_per_stage == (4, 10)
    for choice in (free, tight):
        peaks = [plan_memory(choice.config, shape, rank, MEMORY, on_cpu=True).peak for rank in range(2)]
        assert tuple(peaks) == choice.peaks
        assert choice.config.resolve(2) == choice.config
