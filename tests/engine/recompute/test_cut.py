"""The cut into stages with save sets, against every cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest

from engine.recompute.costs import LayerCost
from engine.recompute.cut import Problem
from engine.recompute.ranks import Cut, Layer, Place
from engine.recompute.solve import Infeasible, Solver
from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import build_schedule

MICRO_BATCHES = 4


def random_layers(rng: random.Random, count: int) -> list[Layer]:
    """Equal blocks between two ends, which hold more at the ends of a stage: the last what it was sent."""

    def layer(kind: str) -> Layer:
        plain = {
            name: LayerCost(kept=kept, forward=kept + rng.randrange(20), backward=kept + rng.randrange(40), seconds=s)
            for name, kept, s in (("all", 20 + rng.randrange(20), 0.0), ("input", rng.randrange(9), rng.random()))
        }
        return Layer(
            kind=kind, costs=lambda place: {name: _at(place, cost) for name, cost in plain.items()},
            seconds=1 + rng.random(), output=7, input_gradient=6,
        )  # fmt: skip

    return [layer("first"), *[layer("block")] * (count - 2), layer("last")]


def _at(place: Place, cost: LayerCost) -> LayerCost:
    kept, held = cost.kept + 2 * place.first, 6 * place.last
    weight = 11 if place.splits else 0
    return replace(
        cost, kept=kept, backward=cost.backward + held + 2, held=held, deferred=4 * bool(weight), weight=weight
    )


def static(rank: int, stages: Sequence[range]) -> int:
    """A number for each layer, and for the rank."""
    return 5 * rank + sum(10 + 7 * (l == 0) for own in stages for l in own)


def cuts(layers: int, stages: int) -> Iterator[tuple[range, ...]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(range(*ends) for ends in itertools.pairwise((0, *inner, layers)))


def solver(layers: list[Layer], schedule: Schedule, stages: tuple[range, ...], rank: int) -> Solver:
    """Of a rank, with the layers of a cut."""
    costs, messages = dict[int, list[Mapping[str, LayerCost]]](), dict[int, tuple[int, int]]()
    for number in schedule.stages_of(rank):
        own, splits = stages[number], "zb" in schedule.name
        costs[number] = [
            layers[l].costs(Place(first=l == own.start, last=own.stop == l + 1 < len(layers), splits=splits))
            for l in own
        ]
        messages[number] = 7 * (own.stop < len(layers)), 6 * (own.start > 0)
    alive = static(rank, [stages[number] for number in costs])
    return Solver(costs, schedule.ranks[rank], static=alive, messages=messages)


def times(layers: list[Layer], schedule: Schedule, stages: tuple[range, ...], budget: int) -> list[float]:
    """Of each rank, its best save sets taken."""
    found = list[float]()
    for rank in range(schedule.num_ranks):
        own = [l for stage in schedule.stages_of(rank) for l in stages[stage]]
        again = solver(layers, schedule, stages, rank).within(budget).seconds
        found.append(MICRO_BATCHES * sum(layers[l].seconds for l in own) + again)
    return found


def every(layers: list[Layer], schedule: Schedule, budget: int) -> tuple[float, int]:
    """The least largest time of all cuts, infinite where none is within the budget, and the least budget for any."""
    best, smallest = float("inf"), 2**60
    for stages in cuts(len(layers), schedule.num_stages):
        try:
            best = min(best, max(times(layers, schedule, stages, budget)))
        except Infeasible:
            needs = [solver(layers, schedule, stages, rank).smallest for rank in range(schedule.num_ranks)]
            smallest = min(smallest, max(needs))
    return best, smallest


def found(layers: list[Layer], schedule: Schedule, budget: int) -> Cut:
    problem = Problem(layers=layers, schedule=schedule, budget=budget, static=static)
    problem.check()
    cut = problem.best()
    assert all(solution.peak <= budget for solution in cut.ranks)
    assert cut.seconds == pytest.approx(times(layers, schedule, cut.stages, budget))
    assert problem.solved(cut.stages) == cut
    return cut


def refused(layers: list[Layer], schedule: Schedule, budget: int) -> None:
    """By all ways alike, with the least budget that is not."""
    problem = Problem(layers=layers, schedule=schedule, budget=budget, static=static)
    for ask in (problem.check, problem.best):
        with pytest.raises(Infeasible) as error:
            ask()
        assert error.value.smallest == budget + 1


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 3), ("zb_h1", 2), ("gpipe", 2)])
def test_one_stage_on_each_rank_is_cut_as_well_as_can_be(name: str, ranks: int) -> None:
    schedule = build_schedule(name, ranks, MICRO_BATCHES)
    for seed in range(3):
        rng = random.Random(f"{name} {seed}")
        layers = random_layers(rng, 6)
        _, smallest = every(layers, schedule, 0)
        refused(layers, schedule, smallest - 1)
        slowest = float("inf")
        for budget in (smallest, smallest + 40, smallest + 150):
            best, _ = every(layers, schedule, budget)
            assert max(found(layers, schedule, budget).seconds) == pytest.approx(best)
            assert best <= slowest
            slowest = best


@pytest.mark.parametrize(("name", "ranks"), [("interleaved", 2), ("zb_v", 2)])
def test_several_stages_on_a_rank_are_cut_well(name: str, ranks: int) -> None:
    schedule = build_schedule(name, ranks, MICRO_BATCHES)
    for seed in range(4):
        layers = random_layers(random.Random(f"{name} {seed}"), 6)
        _, smallest = every(layers, schedule, 0)
        refused(layers, schedule, smallest - 1)
        for budget in (smallest, smallest + 100):
            best, _ = every(layers, schedule, budget)
            assert max(found(layers, schedule, budget).seconds) == pytest.approx(best)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 stages"):
        found(random_layers(random.Random(0), 3), build_schedule("1f1b", 4, 4), 10**9)


def test_stages_that_wait_for_each_other_are_cut_by_the_pace_of_the_step() -> None:
    """Ranks of two stages each, for which only how uneven stages are counts."""
    schedule, layers = build_schedule("interleaved", 2, MICRO_BATCHES), random_layers(random.Random(0), 8)

    def pace(plain: Sequence[float], again: Sequence[float]) -> float:
        return 2 * MICRO_BATCHES * (max(plain) + max(again))

    problem = Problem(layers=layers, schedule=schedule, budget=10**9, static=static, pace=pace)
    best = problem.best()
    every_cut = [problem.solved(stages) for stages in cuts(8, 4)]
    assert problem.step(best) == min(problem.step(cut) for cut in every_cut)
    uneven = next(cut for cut in every_cut if problem.step(cut) > problem.step(best))
    assert problem.best_of(best, uneven.stages) == best == problem.best_of(uneven, best.stages)
    tight = Problem(layers=layers, schedule=schedule, budget=1, static=static, pace=pace)
    assert tight.best_of(uneven, best.stages) == uneven
