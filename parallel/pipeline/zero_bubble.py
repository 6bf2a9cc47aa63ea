"""Zero-bubble schedules: backwards split in two, so that weight gradients fill the time in which a rank would wait.

From Qi et al. 2023, "Zero Bubble Pipeline Parallelism" (ZB-H1, ZB-H2, ZB-V), and Qi et al. 2024, "Pipeline Parallelism
with Controllable Memory" (V-Half), whose idea of a building block makes all four of them:

* The way of one micro-batch through all stages and back is laid out on a clock. The next micro-batch takes the same way
  one interval later, which is the time of the F, I and W of all stages of a rank. A rank's forwards and input gradients
  come in the order of these times. One clock orders all ranks, and each step of the way is later than the one before,
  so no order of this kind can deadlock, and any number of micro-batches will do.
* What a rank keeps is the time that micro-batches spend between F and I on its stages, over the interval. So the steps
  of the way decide on memory: a step to the next rank and its step back take F + I + W together, or twice that.
* Nobody waits for a W. It runs where it fits into the time in which its rank would be idle on that clock, or where the
  next forward would keep more than the schedule is to keep.

The numbers that the clock counts for F, I and W decide on orders that are equally good for F = I = W. They are those
that do best where the times differ, found by trial (docs/log.md).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from parallel.pipeline.actions import Action, ActionKind, Schedule

_KINDS = (ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)


class _Times(NamedTuple):
    """Units of time of each action on the clock."""

    forward: int
    input_gradient: int
    weight_gradient: int


def zb_h1(num_ranks: int, num_micro_batches: int) -> Schedule:
    """As much memory as the first rank of 1F1B on every rank. Compute order, one stage per rank.

    Bubble (p-1)(F+I-W), peak activations p.
    """
    placement = range(num_ranks)
    return _schedule("zb_h1", placement, num_micro_batches, _Times(1, 1, 1), laps=1, most_live=num_ranks)


def zb_h2(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Twice the memory for warm-ups twice as long. Compute order, one stage per rank.

    Bubble (p-1)(F+I-2W) if each rank counts its own time from its first action to its last, peak activations 2p-1.
    The last rank cannot start before (p-1)F, so where ranks wait for each other once a step, as they do for the norm of
    all gradients, the bubble is (p-1)F at least: that of ZB-H1 when F = I = W.
    """
    placement = range(num_ranks)
    return _schedule("zb_h2", placement, num_micro_batches, _Times(1, 1, 1), laps=2, most_live=2 * num_ranks - 1)


def zb_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Two stages per rank in a V. Compute order.

    When F = I = W the bubble is (p-1)F/2 (of a rank's two stages), the least there can be as the last rank starts no
    sooner. Peak activations p.
    """
    placement = _v_shape(num_ranks)
    return _schedule("zb_v", placement, num_micro_batches, _Times(1, 1, 1), laps=2, most_live=2 * num_ranks)


def v_half(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Two stages per rank in a V, at half the memory. Compute order.

    When F = I = W the bubble is (3p-5)F/2 of a rank's two stages from 3 ranks on (of 2: F), less than half of 1F1B's
    3(p-1)F. Peak activations p/2 + 1.
    """
    times = _Times(1000, 1001, 1000)  # I a little longer: what it is longer by adds up over ranks to less than an F
    wait = 0 if num_ranks % 2 else sum(times)
    return _schedule(
        "v_half", _v_shape(num_ranks), num_micro_batches, times, laps=1, wait=wait, most_live=num_ranks + 2
    )


def _v_shape(num_ranks: int) -> list[int]:
    return [*range(num_ranks), *reversed(range(num_ranks))]


def _schedule(
    name: str,
    placement: Sequence[int],
    num_micro_batches: int,
    times: _Times,
    *,
    laps: int,
    wait: int = 0,
    most_live: int,
) -> Schedule:
    """The compute order of a way that is repeated.

    Args:
        laps, wait: see `_way`. most_live: activations that a rank is to keep at most, counted in stages.
    """
    way = _way(placement, times, laps * sum(times), wait)
    ranks = [_Rank(times, most_live) for _ in range(max(placement) + 1)]
    interval = sum(times) * len(placement) // len(ranks)
    m_count, steps = num_micro_batches, len(way)
    # Moments are (time, step, micro-batch), each as one number: that is sorted sooner than a tuple.
    moments = [
        ((time + m * interval) * steps + step) * m_count + m
        for step, (time, *_) in enumerate(way)
        for m in range(m_count)
    ]
    moments.sort()
    arrivals = [0] * m_count  # when the next action of each micro-batch has its input
    runs = [(kind is ActionKind.FORWARD, stage * m_count, ranks[placement[stage]].run) for _, kind, stage in way]
    for moment in moments:
        step, m = moment // m_count % steps, moment % m_count
        is_forward, first, run = runs[step]
        arrivals[m] = run(first + m, arrivals[m], is_forward=is_forward)
    return Schedule(
        name=name,
        num_stages=len(placement),
        num_micro_batches=num_micro_batches,
        stage_to_rank=tuple(placement),
        ranks=tuple(rank.finish(m_count) for rank in ranks),
    )


def _way(placement: Sequence[int], times: _Times, lap: int, wait: int) -> list[tuple[int, ActionKind, int]]:
    """When a micro-batch has its F and I on each stage: times, kinds, stages.

    Args:
        lap: time for a step to the next rank and its step back. wait: that it stays on the last rank where it turns.
    """
    stages = range(len(placement))
    steps = [(ActionKind.FORWARD, s) for s in stages] + [(ActionKind.BACKWARD_INPUT, s) for s in reversed(stages)]
    way, time = [], 0
    for (kind, stage), (_, following) in pairwise([*steps, steps[-1]]):
        way.append((time, kind, stage))
        if placement[following] != placement[stage]:
            time += times.forward if placement[following] > placement[stage] else lap - times.forward
        else:
            time += times.forward if kind is ActionKind.FORWARD else times.input_gradient
            time += wait if placement[stage] == max(placement) else 0
    return way


class _Rank:
    """A rank on the clock, which lays weight gradients between its other actions.

    Stage and micro-batch are one number, `stage * micro_batches + micro_batch`. The program is of numbers, too: three
    times that, and the place of the kind in `_KINDS`. Actions are made of it at the end, so that those of a rank lie
    side by side in memory: whoever walks through millions of them waits for memory most of the time.
    """

    def __init__(self, times: _Times, most_live: int) -> None:
        self.times, self.most_live = times, most_live
        self.now = self.live = 0
        self.program = array("q")
        self.weights: deque[int] = deque()  # that could run

    def run(self, number: int, arrival: int, *, is_forward: bool) -> int:
        """Run a forward or an input gradient once its input is there; returns when it is done."""
        while self.weights and (
            self.now + self.times.weight_gradient <= arrival or (is_forward and self.live >= self.most_live)
        ):
            self._run_weight()
        if is_forward:
            self.live += 1
        else:
            self.weights.append(number)
        self.program.append(3 * number + (not is_forward))
        self.now = max(self.now, arrival) + (self.times.forward if is_forward else self.times.input_gradient)
        return self.now

    def finish(self, micro_batches: int) -> tuple[Action, ...]:
        """The program, with the weight gradients that are left at its end."""
        while self.weights:
            self._run_weight()
        return tuple([Action(_KINDS[n % 3], n // 3 // micro_batches, n // 3 % micro_batches) for n in self.program])

    def _run_weight(self) -> None:
        self.program.append(3 * self.weights.popleft() + 2)
        self.now += self.times.weight_gradient
        self.live -= 1
