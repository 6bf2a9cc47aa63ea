"""`recompute.policy: auto`: within the budget, less again the larger it is, and refused with the least that does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from engine.config import Config, RecomputeConfig
from engine.errors import ConfigError
from engine.plan import plan_memory
from engine.recompute_choice import Choice, by_flops, choose
from parallel.grid import GridShape
from tests.parity.cases import Case

MEMORY = 2.0**30
LAYOUTS: list[dict[str, Any]] = [
    {"model": "sequential"},
    {"model": "parallel", "pipeline": 2, "micro_batches": 4},
    {"model": "pyramid", "pipeline": 2, "schedule": "interleaved", "micro_batches": 4},
    {"model": "kinds", "pipeline": 2, "schedule": "zb_v", "micro_batches": 4, "precision": "bf16"},
    {"model": "parallel", "tensor": 2, "pipeline": 2, "schedule": "zb_h1", "micro_batches": 4, "zero": 3, "data": 2},
]


def within(config: Config, shape: GridShape, budget: int) -> Choice:
    asked = replace(config, recompute=RecomputeConfig(policy="auto", memory_budget=budget))
    return choose(asked, shape, MEMORY, by_flops(asked), on_cpu=True)


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
