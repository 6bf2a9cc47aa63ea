"""The assignment of save sets against every assignment that there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import pytest

from engine.recompute import search
from engine.recompute.costs import LayerCost
from engine.recompute.moments import Messages
from engine.recompute.solve import Infeasible, Solver, front, solve
from parallel.pipeline.actions import Action, ActionKind
from parallel.pipeline.schedules import build_schedule

Stages = dict[int, list[dict[str, LayerCost]]]
Sets = dict[int, tuple[str, ...]]

SCHEDULES = {
    "one rank": ("gpipe", 1, 2, None),
    "gpipe": ("gpipe", 2, 3, None),
    "1f1b": ("1f1b", 3, 4, None),
    "zb_h1": ("zb_h1", 2, 4, None),
    "zb_h2": ("zb_h2", 2, 4, None),
    "interleaved": ("interleaved", 2, 4, 2),
    "interleaved, three each": ("interleaved", 2, 2, 3),
    "zb_v": ("zb_v", 2, 4, None),
    "v_half": ("v_half", 2, 4, None),
}


def walked_peak(stages: Stages, sets: Sets, program: Sequence[Action], messages: Messages) -> int:
    """By the definition: action after action, what each micro-batch keeps, what is on its way, and what the action
    holds."""
    layers = {s: [costs[name] for costs, name in zip(stages[s], sets[s], strict=True)] for s in stages}
    sends = {(a.kind, a.stage, a.micro_batch) for a in program if a.kind.is_send}
    alive, most = dict[object, int](), 0
    for action in program:
        kind, stage, m = action.kind, action.stage, action.micro_batch
        if kind.is_send:
            del alive[kind, stage, m]
        if not kind.is_compute:
            continue
        of, goes_back = layers[stage], kind is not ActionKind.FORWARD
        splits = kind is ActionKind.BACKWARD_INPUT
        own = list[int]()
        for l, layer in enumerate(of):
            behind = sum(x.held + splits * x.deferred for x in of[l + 1 :])
            if kind is ActionKind.BACKWARD_WEIGHT:
                own.append(sum(x.deferred for x in of[: l + 1]) + layer.weight)
            else:
                held = layer.backward + behind if goes_back else layer.forward
                own.append(sum(x.kept for x in of[:l]) + held)
        if kind is ActionKind.BACKWARD_WEIGHT:
            del alive[stage, m, "deferred"]
        else:
            alive.pop((stage, m, "back" if goes_back else "there"), None)
        if splits or kind is ActionKind.BACKWARD:
            del alive[stage, m, "kept"]
        most = max(most, sum(alive.values()) + max(own))
        if kind is ActionKind.BACKWARD_WEIGHT:
            continue
        if not goes_back:
            alive[stage, m, "kept"] = sum(x.kept for x in of)
        if splits:
            alive[stage, m, "deferred"] = sum(x.deferred for x in of)
        to, send = (stage - 1, ActionKind.SEND_BACKWARD) if goes_back else (stage + 1, ActionKind.SEND_FORWARD)
        size = messages[stage][goes_back]
        if to in stages:
            alive[to, m, "back" if goes_back else "there"] = size
        elif (send, stage, m) in sends:
            alive[send, stage, m] = size
    return most


def seconds_of(stages: Stages, sets: Sets, micro_batches: int) -> float:
    each = [costs[name].seconds for s in stages for costs, name in zip(stages[s], sets[s], strict=True)]
    return sum(round(x * 1e12) for x in each) * micro_batches / 1e12


def every(stages: Stages) -> Iterator[Sets]:
    for names in itertools.product(*(costs for s in stages for costs in stages[s])):
        left = iter(names)
        yield {s: tuple(next(left) for _ in stages[s]) for s in stages}


def random_costs(rng: random.Random, most: int) -> dict[str, LayerCost]:
    """Those that keep less mostly take longer, but not always; scratch may be larger than what is kept, or small."""
    found = dict[str, LayerCost]()
    for name in "abcd"[: rng.randint(1, most)]:
        kept, scratch = rng.randrange(40), rng.choice([5, 60])
        deferred, held = rng.randrange(20), rng.choice([0, rng.randrange(30)])
        found[name] = LayerCost(
            kept=kept,
            forward=kept + rng.randrange(scratch),
            backward=max(rng.randrange(scratch) + rng.choice([0, kept]), deferred + held),
            deferred=deferred,
            weight=rng.randrange(60),
            held=held,
            seconds=max(0, 40 - kept + rng.randrange(-20, 20)) * rng.choice([1e-3, 1e-4]),
        )
    return found


def random_stages(rng: random.Random, numbers: Sequence[int]) -> Stages:
    """Few layers in all, in runs of equal ones."""
    total, stages = rng.randint(len(numbers), 6), Stages()
    kinds = [random_costs(rng, 4 if total < 5 else 3) for _ in range(2)]
    sizes = [1] * len(numbers)
    for _ in range(total - len(numbers)):
        sizes[rng.randrange(len(numbers))] += 1
    for number, size in zip(numbers, sizes, strict=True):
        cut = rng.randint(0, size)
        stages[number] = [kinds[0]] * cut + [kinds[1]] * (size - cut)
    return stages


def cases(name: str, count: int) -> Iterator[tuple[Stages, tuple[Action, ...], Messages, int]]:
    """(stages, program, sizes of messages, micro-batches)"""
    schedule = build_schedule(*SCHEDULES[name])
    for seed in range(count):
        rng = random.Random(f"{name} {seed}")
        rank = rng.randrange(schedule.num_ranks)
        stages = random_stages(rng, schedule.stages_of(rank))
        messages = {stage: (rng.randrange(30), rng.randrange(30)) for stage in stages}
        yield stages, schedule.ranks[rank], messages, schedule.num_micro_batches


def pareto(points: Mapping[int, float]) -> list[tuple[int, float]]:
    """Those of (peak, least seconds) that no other is better than in both."""
    found, best = list[tuple[int, float]](), float("inf")
    for peak, seconds in sorted(points.items()):
        if seconds < best:
            found.append((peak, seconds))
            best = seconds
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_best_of_all_assignments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in {"FEW": 1, "MORE": 2, "AT_ONCE": 5}.items():  # as where there is much to look at
        monkeypatch.setattr(search, limit, value)
    for stages, program, messages, micro_batches in cases(name, 12):
        best = dict[int, float]()
        for sets in every(stages):
            peak = walked_peak(stages, sets, program, messages) + 7
            best[peak] = min(best.get(peak, float("inf")), seconds_of(stages, sets, micro_batches))
        expected = pareto(best)

        whole = front(stages, program, static=7, messages=messages)

        assert [(s.peak, s.seconds) for s in whole] == expected
        for solution in whole:
            assert walked_peak(stages, solution.sets, program, messages) + 7 == solution.peak
            assert seconds_of(stages, solution.sets, micro_batches) == solution.seconds
        for budget in (expected[0][0], (expected[0][0] + expected[-1][0]) // 2, expected[-1][0] + 1):
            under = [point for point in expected if point[0] <= budget][-1]
            found = solve(stages, program, static=7, messages=messages, budget=budget)
            assert (found.peak, found.seconds) == under
        with pytest.raises(Infeasible) as error:
            solve(stages, program, static=7, messages=messages, budget=expected[0][0] - 1)
        assert error.value.smallest == expected[0][0]


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_a_front_of_few_points_is_part_of_the_whole_one_and_has_its_ends(name: str) -> None:
    for stages, program, _, _ in cases(name, 4):
        whole, few = front(stages, program), front(stages, program, points=3)
        assert few[0] == whole[0] and few[-1] == whole[-1] and all(s in whole for s in few)
        assert len(few) <= 3
        for near in (few[0].peak, (few[0].peak + few[-1].peak) // 2):
            assert [s for s in whole if s.peak <= near][-1] in few


def test_early_layers_keep_less_than_late_ones_of_the_same_kind() -> None:
    costs = {
        "all": LayerCost(kept=30, forward=30, backward=40),
        "some": LayerCost(kept=10, forward=25, backward=40, seconds=0.2),
        "input": LayerCost(kept=2, forward=25, backward=40, seconds=0.5),
    }
    program = build_schedule("1f1b", 2, 4).ranks[0]
    for solution in front({0: [costs] * 5}, program):
        kept = [costs[name].kept for name in solution.sets[0]]
        assert kept == sorted(kept)


def test_many_layers_are_as_the_plain_knapsack_has_it() -> None:
    """With scratch that is the same for all save sets the peak goes by the sum of what is kept alone."""
    rng, layers = random.Random(0), 48
    costs = dict[str, LayerCost]()
    for i in range(14):
        kept, seconds = 2 + 3 * i + rng.randrange(3), round((14 - i) ** 1.5 + rng.random(), 3)
        costs[f"set {i}"] = LayerCost(kept=kept, forward=kept + 5, backward=kept + 9, seconds=seconds)
    best = {0: 0.0}
    for _ in range(layers):
        sums = [(total + c.kept, took + c.seconds) for total, took in best.items() for c in costs.values()]
        best = dict(sorted(sums, reverse=True))  # the last of a key stays, which took least
    program = build_schedule("1f1b", 4, 8).ranks[0]
    solver = Solver({0: [costs] * layers}, program, static=11)
    for total in (min(best), 400, 401, 1001, max(best)):
        found = solver.within(4 * total + 9 + 11)
        assert found.seconds == pytest.approx(8 * min(took for other, took in best.items() if other <= total))
    assert solver.smallest == 4 * min(best) + 9 + 11


def test_what_cannot_be_solved_is_said() -> None:
    program = build_schedule("1f1b", 2, 2).ranks[0]
    costs = {"all": LayerCost(kept=1, forward=1, backward=1)}
    with pytest.raises(ValueError, match="stages \\[1\\]"):
        solve({1: [costs]}, program, budget=10)
    with pytest.raises(ValueError, match="no save set"):
        solve({0: [{}]}, program, budget=10)
    with pytest.raises(ValueError, match="RECOMPUTE"):
        solve({0: [costs]}, [Action.parse(a) for a in ("0F0", "0R0", "0B0")], budget=10)
