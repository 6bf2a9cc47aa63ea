"""Schedules with several stages per rank or split backwards against the closed forms of the papers they are from."""

import pytest

from parallel.pipeline import Costs, Timeline, compute_order, simulate

RANKS = (1, 2, 3, 4, 5, 8)
TIMES = [(1.0, 1.0, 1.0), (1.0, 1.25, 0.75), (1.0, 1.0, 0.5), (1.0, 1.0, 1.5), (3.0, 1.0, 0.25)]


def run(name: str, p: int, m: int, times: tuple[float, float, float] = TIMES[0], v: int | None = None) -> Timeline:
    f, i, w = times
    return simulate(compute_order(name, p, m, v), Costs(forward=f, backward_input=i, backward_weight=w))


def bubble(name: str, p: int, m: int, times: tuple[float, float, float] = TIMES[0], v: int | None = None) -> float:
    """Idle time of a step, in which ranks wait for the last of them."""
    timeline = run(name, p, m, times, v)
    work = sum(interval.end - interval.start for interval in timeline.ranks[0])
    return timeline.makespan - work


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("v", [2, 3, 4])
def test_interleaved(p: int, v: int) -> None:
    for m in (p, 2 * p, 3 * p):
        for f, i, w in TIMES[:3]:  # of a stage, so that a rank's F and B are v times these
            assert bubble("interleaved", p, m, (f, i, w), v) == pytest.approx((p - 1) * (f + i + w))
        peaks = tuple(min(m * v, (v - 1) * p + 2 * (p - rank - 1) + 1) / v for rank in range(p))
        assert run("interleaved", p, m, v=v).peak_activations == peaks
    whole = {m: run("interleaved", p, m, v=v) for m in range(1, 3 * p + 1)}
    for m, timeline in whole.items():
        full = whole[-(-m // p) * p]
        assert timeline.makespan <= full.makespan
        assert all(a <= b for a, b in zip(timeline.peak_activations, full.peak_activations, strict=True))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize(("f", "i", "w"), TIMES)
def test_zb_h1_and_h2(p: int, f: float, i: float, w: float) -> None:
    """Of all ranks, of which the last starts (p-1)F late, and of each by itself, from its first action to its last."""
    for name, weights in (("zb_h1", 1), ("zb_h2", 2)):
        for m in (2 * p, 3 * p + 1):
            formula = (p - 1) * (f + i - weights * w)
            assert bubble(name, p, m, (f, i, w)) == pytest.approx(max(formula, (p - 1) * f))
            if w <= i:
                own = max(row[-1].end - row[0].start for row in run(name, p, m, (f, i, w)).ranks)
                assert own - m * (f + i + w) == pytest.approx(max(formula, 0))


@pytest.mark.parametrize("p", [*RANKS, 12, 13, 32])
def test_v_schedules(p: int) -> None:
    """In units of one of a rank's two stages, F = I = W = 1, where 1F1B's bubble is 6(p-1)."""
    for m in (p, 2 * p, 3 * p + 1):
        assert bubble("zb_v", p, m) == p - 1  # the last rank cannot start sooner
        assert bubble("v_half", p, m) == {1: 0, 2: 2}.get(p, 3 * p - 5) <= 3 * (p - 1)


@pytest.mark.parametrize("p", [*RANKS, 13, 16])
def test_memory_and_time_for_any_number_of_micro_batches(p: int) -> None:
    """The peak is within the paper's, reached once there are micro-batches enough; more of them take no less time."""
    most = {"zb_h1": p, "zb_h2": 2 * p - 1, "zb_v": p, "v_half": p / 2 + 1}
    for name, peak in most.items():
        last = 0.0
        for m in sorted({1, 2, 3, p - 1, p, p + 1, 2 * p + 1} - {0}):
            timeline = run(name, p, m)
            assert max(timeline.peak_activations) <= min(peak, m)
            assert timeline.makespan > last
            last = timeline.makespan
        assert max(timeline.peak_activations) == min(peak, m)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 32), (7, 24), (8, 24)])
def test_shares_of_the_bubble_of_1f1b(p: int, m: int) -> None:
    """What the papers promise for F = I = W; what is left of it where the times differ, as they do with full recompute
    (1, 2, 1), does not grow with the number of micro-batches.
    """
    for times, most in {
        (1.0, 1.0, 1.0): {"zb_h1": 0.34, "zb_v": 0.17, "v_half": 0.46},
        (1.0, 1.2, 0.8): {"zb_h1": 0.47, "zb_v": 0.27, "v_half": 0.6},
        (1.0, 1.0, 0.5): {"zb_h1": 0.61, "zb_v": 0.31, "v_half": 0.68},
        (1.0, 2.0, 1.0): {"zb_h1": 0.51, "zb_v": 0.38, "v_half": 0.73},
    }.items():
        whole = bubble("1f1b", p, m, times)
        for name, share in most.items():
            stages = 2 if name in ("zb_v", "v_half") else 1
            assert bubble(name, p, m, times) / stages <= share * whole, (name, times)


def test_v_placement() -> None:
    """The first and the last stage are on one rank."""
    for name in ("zb_v", "v_half"):
        assert compute_order(name, 3, 1).stage_to_rank == (0, 1, 2, 2, 1, 0)
