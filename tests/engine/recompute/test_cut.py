"""The cut into stages with save sets, against every cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from engine.recompute.costs import LayerCost
from engine.recompute.cut import Cut, Layer, cut_and_assign
from engine.recompute.solve import Infeasible, Solver
from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import build_schedule

MICRO_BATCHES = 4


def random_layers(rng: random.Random, count: int) -> list[Layer]:
    """Equal blocks between two ends."""

    def layer() -> Layer:
        costs = {
            name: LayerCost(kept=kept, forward=kept + rng.randrange(20), backward=kept + rng.randrange(40), seconds=s)
            for name, kept, s in (("all", 20 + rng.randrange(20), 0.0), ("input", rng.randrange(9), rng.random()))
        }
        return Layer(costs=costs, seconds=1 + rng.random(), static=rng.randrange(30))

    return [layer(), *[layer()] * (count - 2), layer()]


def cuts(layers: int, stages: int) -> Iterator[tuple[range, ...]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(range(*ends) for ends in itertools.pairwise((0, *inner, layers)))


def times(layers: list[Layer], schedule: Schedule, stages: tuple[range, ...], budget: int) -> list[float]:
    """Of each rank, its best save sets taken."""
    found = list[float]()
    for rank, program in enumerate(schedule.ranks):
        own = [l for stage in schedule.stages_of(rank) for l in stages[stage]]
        costs = {stage: [layers[l].costs for l in stages[stage]] for stage in schedule.stages_of(rank)}
        static = 5 * rank + sum(layers[l].static for l in own)
        again = Solver(costs, program, static=static).within(budget).seconds
        found.append(MICRO_BATCHES * sum(layers[l].seconds for l in own) + again)
    return found


def every(layers: list[Layer], schedule: Schedule, budget: int) -> tuple[float, int]:
    """The least largest time of all cuts, infinite where none is within the budget, and the least budget for any."""
    best, smallest = float("inf"), 2**60
    for stages in cuts(len(layers), schedule.num_stages):
        try:
            best = min(best, max(times(layers, schedule, stages, budget)))
        except Infeasible:
            needs = 0
            for rank, program in enumerate(schedule.ranks):
                costs = {stage: [layers[l].costs for l in stages[stage]] for stage in schedule.stages_of(rank)}
                static = 5 * rank + sum(layers[l].static for s in schedule.stages_of(rank) for l in stages[s])
                needs = max(needs, Solver(costs, program, static=static).smallest)
            smallest = min(smallest, needs)
    return best, smallest


def found(layers: list[Layer], schedule: Schedule, budget: int) -> Cut:
    static = [5 * rank for rank in range(schedule.num_ranks)]
    cut = cut_and_assign(layers, schedule, budget=budget, static=static)
    assert all(solution.peak <= budget for solution in cut.ranks)
    assert cut.seconds == pytest.approx(times(layers, schedule, cut.stages, budget))
    return cut


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 3), ("zb_h1", 2), ("gpipe", 2)])
def test_one_stage_on_each_rank_is_cut_as_well_as_can_be(name: str, ranks: int) -> None:
    schedule = build_schedule(name, ranks, MICRO_BATCHES)
    for seed in range(3):
        rng = random.Random(f"{name} {seed}")
        layers = random_layers(rng, 6)
        _, smallest = every(layers, schedule, 0)
        with pytest.raises(Infeasible) as error:
            cut_and_assign(layers, schedule, budget=smallest - 1, static=[5 * r for r in range(ranks)])
        assert error.value.smallest == smallest
        for budget in (smallest, smallest + 40, smallest + 150):
            best, _ = every(layers, schedule, budget)
            assert max(found(layers, schedule, budget).seconds) == pytest.approx(best)


@pytest.mark.parametrize(("name", "ranks"), [("interleaved", 2), ("zb_v", 2)])
def test_several_stages_on_a_rank_are_cut_well(name: str, ranks: int) -> None:
    schedule = build_schedule(name, ranks, MICRO_BATCHES)
    for seed in range(4):
        layers = random_layers(random.Random(f"{name} {seed}"), 6)
        _, smallest = every(layers, schedule, 0)
        for budget in (smallest, smallest + 100):
            best, _ = every(layers, schedule, budget)
            assert max(found(layers, schedule, budget).seconds) == pytest.approx(best)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 stages"):
        cut_and_assign(random_layers(random.Random(0), 3), build_schedule("1f1b", 4, 4), budget=10**9)
