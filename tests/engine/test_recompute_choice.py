"""`recompute.policy: auto`: within the budget, less again the larger it is, and refused with the least that does."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from data import DataConfig
from engine.assemble import Assembly, assemble
from engine.config import Config, RecomputeConfig
from engine.errors import ConfigError
from engine.plan import plan_memory
from engine.recompute_choice import Choice, by_flops, choose, settled
from engine.run.step import Stepper
from parallel.grid import Grid, GridShape, make_grid
from parallel.process_group import World
from tests.parity.cases import Case
from tools.benchmark.bench import stream_of

MEMORY = 2.0**30
LAYOUTS: list[dict[str, Any]] = [
    {"model": "sequential"},
    {"model": "parallel", "pipeline": 2, "micro_batches": 4},
    {"model": "pyramid", "pipeline": 2, "schedule": "interleaved", "micro_batches": 4},
    {"model": "kinds", "pipeline": 2, "schedule": "zb_v", "micro_batches": 4, "precision": "bf16"},
    {"model": "parallel", "tensor": 2, "pipeline": 2, "schedule": "zb_h1", "micro_batches": 4, "zero": 3, "data": 2},
]


def asking(config: Config, budget: int) -> Config:
    return replace(config, recompute=RecomputeConfig(policy="auto", memory_budget=budget))


def within(config: Config, shape: GridShape, budget: int) -> Choice:
    asked = asking(config, budget)
    return choose(asked, shape, MEMORY, by_flops(asked), on_cpu=True)


def test_a_run_keeps_what_was_chosen() -> None:
    """With times measured here, the bits of `none`."""
    case = Case("sequential", micro_batches=2)
    world, device = World(), torch.device("cpu")
    grid = make_grid(case.config().grid_shape(1), world)
    _, kept = train(case.config(), grid)
    most = max(within(case.config(), grid.shape, 2**40).peaks)
    config, lines = settled(asking(case.config(), most - 2**16), grid, device, MEMORY)
    assert len(lines) == 1 and f"chosen within {(most - 2**16) / 2**20:,.1f} MiB" in lines[0]
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
    with pytest.raises(ConfigError, match="needs") as refused:
        within(config, shape, 1)
    least = int(str(refused.value).partition("give recompute.memory_budget ")[2].partition(",")[0])
    with pytest.raises(ConfigError, match="needs"):
        within(config, shape, least - 1)
    most = max(unbounded.peaks)
    budgets = [least, *(least + (most - least) * i // 5 for i in range(1, 5)), most]
    found = [within(config, shape, budget) for budget in budgets]
    for choice, budget in zip(found, budgets, strict=True):
        assert max(choice.peaks) <= budget == choice.budget
    for tight, wide in pairwise(found):
        assert all(a >= b for a, b in zip(tight.seconds, wide.seconds, strict=True))
    assert sum(found[0].seconds) > 0 == max(found[-1].seconds)
    apart = shape.world_size // shape.pipeline
    again = [plan_memory(found[1].config, shape, rank * apart, MEMORY, on_cpu=True) for rank in range(shape.pipeline)]
    assert tuple(plan.peak for plan in again) == found[1].peaks
