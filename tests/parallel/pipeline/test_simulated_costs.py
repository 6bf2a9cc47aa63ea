"""What the simulator makes of its costs: by hand where messages take time, and what must not change the result."""

import math
import statistics
import time
from itertools import pairwise

import pytest

from parallel.pipeline import (
    SCHEDULES,
    Costs,
    Schedule,
    Timeline,
    build_schedule,
    compute_order,
    insert_communication,
    simulate,
    sum_layers,
)
from parallel.pipeline.actions import live_activations
from parallel.pipeline.costs import LIMITS, PerStage
from parallel.pipeline.graph import data_dependencies, input_receive
from parallel.pipeline.readiness import POLICIES, Policy


def times(timeline: Timeline) -> list[list[tuple[str, float, float]]]:
    return [[(str(i.action), i.start, i.end) for i in rank] for rank in timeline.ranks]


@pytest.mark.parametrize("policy", POLICIES)
def test_latency_and_bandwidth_by_hand(policy: Policy) -> None:
    """Outputs of 6 bytes take 1 + 3, gradients of 2 bytes 1 + 1; in one direction they pass one after the other."""
    schedule = insert_communication(Schedule.from_text("0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"))
    costs = Costs(
        forward=(1.0, 2.0), backward_weight=0.0, latency=1.0, bandwidth=2.0, output_bytes=6.0, gradient_bytes=(2.0,)
    )
    timeline = simulate(schedule, costs, policy)
    assert times(timeline) == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 14, 15), ("0B1", 16, 17)],
        [("1F0", 5, 7), ("1F1", 9, 11), ("1B0", 11, 12), ("1B1", 12, 13)],
    ]
    assert [(str(m.receive), m.source, m.target, m.start, m.end) for m in timeline.messages] == [
        ("1RECV_F0", 0, 1, 1, 5),
        ("1RECV_F1", 0, 1, 5, 9),
        ("0RECV_B0", 1, 0, 12, 14),
        ("0RECV_B1", 1, 0, 14, 16),
    ][: len(timeline.messages)]
    assert timeline.bubble == (13, 11)


def test_a_lane_does_not_wait_for_the_other_direction() -> None:
    """Static: the receive of a gradient is posted before the send of a late output, and nothing passes before it."""
    order = Schedule.from_text("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1")
    costs = Costs(forward=(4.0, 1.0), latency=3.0)
    static, ready = (simulate(insert_communication(order), costs, policy).step_time for policy in POLICIES)
    assert ready < static


def test_ranks_of_two_speeds() -> None:
    """1F1B, the first rank at half the speed: it waits once, for F and B of the other less its own second forward."""
    timeline = simulate(build_schedule("1f1b", 2, 4), Costs(speed=(0.5, 1.0), optimizer=3.0))
    assert timeline.makespan == 4 * 6 + 1
    assert timeline.optimizer == (6, 3) and timeline.step_time == 25 + 6
    assert timeline.bubble == (1, 31 - 4 * 3 - 3)


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2", "zb_v"])
def test_the_norm_waits_for_the_last_weight_gradient_of_all(name: str) -> None:
    costs = Costs(norm=0.5, optimizer=(1.0, 2.0, 1.0))
    alone, timeline = simulate(build_schedule(name, 3, 6), Costs()), simulate(build_schedule(name, 3, 6), costs)
    assert timeline.makespan == alone.makespan and timeline.step_time == alone.makespan + 0.5 + 2
    assert timeline.barrier_wait == alone.barrier_wait and min(alone.barrier_wait) == 0
    assert timeline.bubble == tuple(b + extra for b, extra in zip(alone.bubble, (1, 0, 1), strict=True))
    busy = sum(i.end - i.start for rank in timeline.ranks for i in rank)
    assert timeline.bubble_fraction == pytest.approx(1 - (busy + 3 * 0.5 + 4) / (3 * timeline.step_time))


def test_bytes_that_are_alive() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3), Costs(activation_bytes=(10.0, 7.0)))
    assert timeline.live_bytes(0) == [10, 20, 10, 20, 10, 0]
    assert timeline.peak_bytes == (20, 7)


def test_layers_are_summed_to_stages() -> None:
    assert sum_layers([1.0, 2.0, 4.0, 8.0], [range(1), range(1, 4)]) == (1, 14)


@pytest.mark.parametrize("policy", POLICIES)
def test_jitter(policy: Policy) -> None:
    """None at 0, the same again from the same seed; mean and deviation as asked; an action's draw is its own."""
    schedule, still = build_schedule("zb_v", 2, 400), build_schedule("1f1b", 2, 5)
    assert times(simulate(still, Costs(jitter=0.0, seed=3), policy)) == times(simulate(still, Costs(), policy))
    one, again, other = (simulate(schedule, Costs(jitter=0.3, seed=seed), policy) for seed in (1, 1, 2))
    assert times(one) == times(again) != times(other)
    durations = [i.end - i.start for rank in one.ranks for i in rank]
    assert statistics.mean(durations) == pytest.approx(1, abs=0.02)
    assert statistics.stdev(durations) == pytest.approx(0.3, abs=0.02)
    lengths = [{i.action: i.end - i.start for r in t.ranks for i in r} for t in (one, simulate(schedule, one.costs))]
    assert lengths[0] == pytest.approx(lengths[1])


def test_costs_of_another_shape() -> None:
    schedule = build_schedule("1f1b", 3, 2)
    for wrong in (Costs(speed=(1.0, 1.0)), Costs(output_bytes=(1.0,) * 3), Costs(optimizer=(1.0,))):
        with pytest.raises(ValueError, match=r"has . entries for . (ranks|boundaries of stages)"):
            simulate(schedule, wrong)
    with pytest.raises(ValueError, match="policy 'eager': choose one of static, ready"):
        simulate(schedule, Costs(), "eager")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "values", "limit"),
    [
        ("speed", (0.0, 1e-10, float("nan"), (1.0, 0.0)), "a number, 1e-09 to 1e\\+09, or a tuple"),
        ("bandwidth", (0.0, 1e-308, (1.0,)), "a number, 1e-09 or more$"),
        ("jitter", (-0.1, 1e10, "0.1"), "a number, 0 to 10$"),
        ("norm", (float("inf"), None, True), "a number, 0 to 1e\\+18$"),
        ("forward", (1e308, "1", [1.0, 1.0], -1, (1.0, "1")), "a number, 0 to 1e\\+18, or a tuple"),
        ("output_bytes", (1e308, float("nan")), "a number, 0 to 1e\\+18"),
        ("seed", (1.5, -1, 10**400), "a whole number, 0 to 1e\\+18$"),
    ],
)
def test_numbers_beyond_their_limits(field: str, values: tuple[object, ...], limit: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"costs: {field} is .*: it must be {limit}"):
            Costs(**{field: value})  # type: ignore[arg-type]


def test_what_the_limits_allow_stays_a_number() -> None:
    each = {name: limit.most for name, limit in LIMITS.items() if not limit.is_whole}
    slow = each | {"speed": LIMITS["speed"].least, "bandwidth": LIMITS["bandwidth"].least}
    for costs in (Costs(**each), Costs(**slow), Costs(**slow | {"jitter": 0.0})):
        for policy in POLICIES:
            step = simulate(build_schedule("zb_v", 2, 4), costs, policy)
            assert all(map(math.isfinite, (step.step_time, step.bubble_fraction, *step.bubble, *step.peak_bytes)))


EVEN: list[tuple[PerStage, PerStage, PerStage]] = [(1.0, 1.0, 1.0), (1.0, 1.3, 0.7), (1.0, 0.8, 1.2), (1.0, 2.0, 1.0)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_ready_costs_nothing_without_jitter(name: str) -> None:
    """Never more than 2 % over the program in order: any latency, any times, even stages and uneven ones."""
    for p, m in [(2, 3), (2, 8), (3, 7), (4, 8), (4, 16), (8, 16)]:
        schedule = build_schedule(name, p, m)
        uneven = tuple(1 + (37 * stage % 11) / 20 for stage in range(schedule.num_stages))
        stages_per_rank = schedule.num_stages / p
        for latency in (0.0, 0.1, 0.3):
            for f, i, w in [*EVEN, (uneven, uneven, uneven)]:
                costs = Costs(forward=f, backward_input=i, backward_weight=w, latency=latency * 2 / stages_per_rank)
                static, ready = (simulate(schedule, costs, policy) for policy in POLICIES)
                assert ready.step_time <= 1.02 * static.step_time, (p, m, costs)
                check_ready(schedule, ready)


def check_ready(schedule: Schedule, timeline: Timeline) -> None:
    """It runs each action once, on its own, after its input, with no more alive than the program in order has."""
    ends = {i.action: i.end for rank in timeline.ranks for i in rank}
    arrivals = {m.receive: m.end for m in timeline.messages}
    for rank, intervals in enumerate(timeline.ranks):
        program = [a for a in schedule.ranks[rank] if a.kind.is_compute]
        assert sorted(map(str, program)) == sorted(str(i.action) for i in intervals)
        assert all(a.end <= b.start for a, b in pairwise(intervals))
        assert max(timeline.live_activations(rank)) <= max(live_activations(schedule, rank))
        for interval in intervals:
            receive = input_receive(interval.action, schedule)
            needed = [ends[a] for a in data_dependencies(interval.action, schedule)]
            needed += [] if receive is None else [arrivals[receive]]
            assert max(needed, default=0.0) <= interval.start * (1 + 1e-8)


def mean_step(name: str, p: int, m: int, policy: Policy) -> float:
    schedule = build_schedule(name, p, m)
    part = p / schedule.num_stages  # the same work per rank, however many stages it has
    parts = {"forward": part, "backward_input": part, "backward_weight": part}
    steps = [simulate(schedule, Costs(jitter=0.3, seed=seed, latency=0.1, **parts), policy) for seed in range(4)]
    return statistics.mean(step.step_time for step in steps)


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 8), (4, 16), (8, 16)])
def test_ready_under_jitter(p: int, m: int) -> None:
    """By 10 % faster than 1F1B in order, of which its own part is told by what the same schedule takes in order."""
    one_f_one_b = mean_step("1f1b", p, m, "static")
    assert mean_step("1f1b", p, m, "ready") < one_f_one_b
    for name, gain in [("zb_h1", 0.0), ("zb_v", 0.01), ("v_half", 0.01)]:
        ready = mean_step(name, p, m, "ready")
        assert ready < 0.9 * one_f_one_b
        assert ready <= (1 - gain) * mean_step(name, p, m, "static")


def test_many_ranks() -> None:
    """A fiftieth of 1,000 ranks and 2,000 micro-batches, which are to take under 30 s; a fifth of that rate will do."""
    start = time.process_time()
    timeline = simulate(compute_order("1f1b", 200, 200), Costs())
    assert timeline.makespan == 3 * (200 + 200 - 1)
    assert time.process_time() - start < 3
