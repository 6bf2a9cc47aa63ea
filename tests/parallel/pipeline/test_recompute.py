"""Where recomputes go: into time that a rank would wait, never longer for it, no more ahead than the cap says."""

import random
from dataclasses import replace

import pytest

from parallel.pipeline import (
    SCHEDULES,
    ActionKind,
    Costs,
    Schedule,
    build_schedule,
    compute_order,
    forward_only,
    simulate,
    validate,
    with_recompute,
)
from parallel.pipeline.actions import live_activations, recomputed_ahead
from parallel.pipeline.readiness import POLICIES
from parallel.pipeline.validation import validate_compute_order

FULL = Costs(forward=1, backward_input=1, backward_weight=1, recompute=1)


def computes(schedule: Schedule) -> list[str]:
    return [" ".join(str(a) for a in program if a.kind.is_compute) for program in schedule.ranks]


def test_1f1b_recomputes_in_its_waits_alone() -> None:
    """Not in the steady phase, where nobody waits, and not on the last stage, whose backwards follow at once."""
    found = with_recompute(build_schedule("1f1b", 3, 4), FULL)
    assert computes(found) == [
        "0F0 0F1 0F2 0R0 0B0 0F3 0R1 0B1 0R2 0B2 0R3 0B3",
        "1F0 1F1 1R0 1B0 1F2 1R1 1B1 1F3 1R2 1B2 1R3 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    for program, before in zip(found.ranks, build_schedule("1f1b", 3, 4).ranks, strict=True):
        assert tuple(a for a in program if a.kind is not ActionKind.RECOMPUTE) == before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (8, 8)])
def test_the_bubble_is_shorter_by_what_is_recomputed_on_the_way_back(name: str, p: int, m: int, policy: str) -> None:
    """(p-1)(F+B) instead of (p-1)(F+R+B)."""
    schedule = build_schedule(name, p, m)
    assert simulate(schedule, FULL, policy).makespan == pytest.approx((m + p - 1) * 4)  # type: ignore[arg-type]
    assert simulate(with_recompute(schedule, FULL), FULL, policy).makespan == pytest.approx(m * 4 + (p - 1) * 3)  # type: ignore[arg-type]


def drawn(draw: random.Random, stages: int) -> Costs:
    """Uneven stages, of which some drop nothing; messages that take time; jitter."""

    def each() -> tuple[float, ...]:
        return tuple(draw.choice((1.0, draw.uniform(0.3, 2))) for _ in range(stages))

    return Costs(
        forward=each(), backward_input=each(), backward_weight=each(), latency=draw.choice((0, 0.1, 0.7)),
        recompute=tuple(draw.choice((0.0, draw.uniform(0.01, 1.5))) for _ in range(stages)),
        jitter=draw.choice((0, 0.3)), seed=draw.randrange(9),
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_never_longer_and_no_more_ahead_than_the_cap(name: str) -> None:
    draw, shorter, longest = random.Random(name), 0, 0.0
    for p, m in [(2, 3), (3, 7), (4, 4), (4, 9)] * 5:
        alone = draw.random() < 0.3
        schedule = compute_order(name, p, m) if alone else build_schedule(name, p, m)
        costs = drawn(draw, schedule.num_stages)
        before = simulate(schedule, costs)
        for ahead in (1, 3):
            found = with_recompute(schedule, costs, ahead=ahead)
            (validate_compute_order if alone else validate)(found)
            after = simulate(found, costs)
            for was, now in zip(before.ends, after.ends, strict=True):
                assert now[-1] <= was[-1] * (1 + 1e-9)
            shorter += after.makespan < before.makespan - 1e-9
            for rank in range(p):
                assert max(recomputed_ahead(found.ranks[rank])) <= ahead
                assert max(live_activations(found, rank)) == max(live_activations(schedule, rank))
            ready = [simulate(one, costs, "ready").makespan for one in (schedule, found)]
            longest = max(longest, ready[1] / ready[0])
    assert shorter > 10
    assert longest <= 1 + 1e-9


def test_more_ahead_where_the_cap_and_the_wait_have_room() -> None:
    costs = replace(FULL, recompute=(1.0, 1.0, 0.0))
    steps = [simulate(with_recompute(build_schedule("1f1b", 3, 9), costs, ahead=n), costs).makespan for n in (1, 2, 3)]
    assert steps == sorted(steps, reverse=True)
    program = with_recompute(build_schedule("1f1b", 3, 4), costs, ahead=2).ranks[0]
    assert "0R0 0R1 0B0" in " ".join(map(str, program))
    assert max(recomputed_ahead(program)) == 2


def test_what_is_left_as_it_is() -> None:
    schedule = build_schedule("1f1b", 2, 3)
    assert with_recompute(schedule, Costs()) is schedule
    evaluation = forward_only(2, 3)
    assert with_recompute(evaluation, FULL) is evaluation
    with pytest.raises(ValueError, match=r"has recomputes \(R\) already"):
        with_recompute(with_recompute(schedule, FULL), FULL)
    with pytest.raises(ValueError, match="0 micro-batches recomputed ahead"):
        with_recompute(schedule, FULL, ahead=0)


def test_memory_of_what_is_recomputed() -> None:
    """From R, or from I where there is none, until the backward is over; what is kept, from F."""
    schedule = Schedule.from_text("0F0 0F1 0R0 0I0 0W0 0I1 0W1 0F2 0R2 0B2")
    timeline = simulate(schedule, Costs(activation_bytes=2.0, recomputed_bytes=10.0))
    assert timeline.live_bytes(0) == [2, 4, 14, 14, 2, 12, 0, 2, 12, 0]
    assert timeline.peak_bytes == (14,)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_backward_without_r_takes_its_time(policy: str) -> None:
    schedule = Schedule.from_text("0F0 0B0 0F1 0R1 0B1 0F2 0I2 0W2")
    costs = Costs(forward=1, backward_input=2, backward_weight=4, recompute=8, speed=2.0)
    (rank,) = simulate(schedule, costs, policy).ranks  # type: ignore[arg-type]
    spans = {str(i.action): i.end - i.start for i in rank}
    assert spans["0B0"] == 7 and spans["0I2"] == 5 and spans["0W2"] == 2
    assert spans["0B1"] + spans.get("0R1", 0) == 7
    assert ("0R1" in spans) is (policy == "static")  # its backward is ready as soon as it is
