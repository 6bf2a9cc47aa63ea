"""Zero-bubble schedules: backwards split in two, so that weight gradients fill the time in which a rank would wait.

From Qi et al. 2023, "Zero Bubble Pipeline Parallelism" (ZB-H1, ZB-H2, ZB-V), and Qi et al. 2024, "Pipeline Parallelism
with Controllable Memory" (V-Half), whose idea of a building block makes all four of them:

* The way of one micro-batch through all stages and back is laid out in units of time, one per F and one per I. The next
  micro-batch takes the same way one interval later: 3 units per stage of a rank, for its F, I and W. A rank's forwards
  and input gradients come in the order of these times. One clock orders all ranks, and each step of the way is later
  than the one before it, so no order of this kind can deadlock, and any number of micro-batches will do.
* What a rank keeps is the time that micro-batches spend between F and I on its stages, over the interval. So the steps
  of the way decide on memory: a step from one rank to the next and its step back take 3 or 6 units together.
* Nobody waits for a W. It runs where its rank would else be idle on a machine with F = I = W = 1, or where the next
  forward would keep more than the schedule is to keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from parallel.pipeline.actions import Action, ActionKind, Schedule


def zb_h1(num_ranks: int, num_micro_batches: int) -> Schedule:
    """As much memory as the first rank of 1F1B on every rank. Compute order, one stage per rank.

    Bubble (p-1)(F+I-W), peak activations p.
    """
    gaps = _way(num_ranks, steps=[1, 2], turns=[1])
    return _schedule("zb_h1", range(num_ranks), gaps, num_micro_batches, most_live=num_ranks)


def zb_h2(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Twice the memory for warm-ups twice as long. Compute order, one stage per rank.

    Bubble (p-1)(F+I-2W) if each rank counts its own time from its first action to its last, peak activations 2p-1.
    The last rank cannot start before (p-1)F, so where ranks wait for each other once a step, as they do for the norm of
    all gradients, the bubble is (p-1)F at least: that of ZB-H1 when F = I = W.
    """
    gaps = _way(num_ranks, steps=[1, 5], turns=[1])
    return _schedule("zb_h2", range(num_ranks), gaps, num_micro_batches, most_live=2 * num_ranks - 1)


def zb_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Two stages per rank in a V. Compute order.

    When F = I = W the bubble is (p-1)F/2 (of a rank's two stages), the least there can be as the last rank starts no
    sooner. Peak activations p.
    """
    gaps = _way(num_ranks, steps=[1, 5, 1, 5], turns=[1, 1, 1])
    return _schedule("zb_v", _v_shape(num_ranks), gaps, num_micro_batches, most_live=2 * num_ranks)


def v_half(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Two stages per rank in a V, at half the memory. Compute order.

    When F = I = W the bubble is (3p-5)F/2 of a rank's two stages (of 2 ranks: F), less than half of 1F1B's 3(p-1)F.
    Peak activations p/2 + 1. Where they differ much, ranks wait for each other in turn and the bubble grows with m,
    unless they run what is ready (`parallel.schedule_policy`).
    """
    turn = 1 if num_ranks % 2 else 4  # by trial: see docs/log.md
    gaps = _way(num_ranks, steps=[1, 2, 1, 2], turns=[turn, 1, turn])
    return _schedule("v_half", _v_shape(num_ranks), gaps, num_micro_batches, most_live=num_ranks + 2)


def _v_shape(num_ranks: int) -> list[int]:
    return [*range(num_ranks), *reversed(range(num_ranks))]


def _way(num_ranks: int, *, steps: Sequence[int], turns: Sequence[int]) -> list[int]:
    """Units of time from each action of a micro-batch to the next, from its first F to its last I.

    Args:
        steps: from one rank to the next, for each passage over all ranks. turns: on one rank, from passage to passage.
    """
    gaps = [steps[0]] * (num_ranks - 1)
    for turn, step in zip(turns, steps[1:], strict=True):
        gaps += [turn] + [step] * (num_ranks - 1)
    return gaps


def _schedule(
    name: str, placement: Sequence[int], gaps: Sequence[int], num_micro_batches: int, *, most_live: int
) -> Schedule:
    """The compute order of a building block that is repeated.

    Args:
        gaps: see `_way`. most_live: activations that a rank is to keep at most, counted in stages.
    """
    last = len(placement) - 1
    way = [(ActionKind.FORWARD, s) for s in range(last + 1)]
    way += [(ActionKind.BACKWARD_INPUT, s) for s in reversed(range(last + 1))]
    num_ranks = max(placement) + 1
    interval = 3 * len(placement) // num_ranks
    times = list(accumulate(gaps, initial=0))
    moments = [(time + m * interval, step, m) for m in range(num_micro_batches) for step, time in enumerate(times)]
    ranks = [_Rank(most_live) for _ in range(num_ranks)]
    arrivals = [0] * num_micro_batches  # when the next action of each micro-batch has its input
    for _, step, m in sorted(moments):
        kind, stage = way[step]
        arrivals[m] = ranks[placement[stage]].run(Action(kind, stage, m), arrivals[m])
    return Schedule(
        name=name,
        num_stages=len(placement),
        num_micro_batches=num_micro_batches,
        stage_to_rank=tuple(placement),
        ranks=tuple(rank.finish() for rank in ranks),
    )


class _Rank:
    """A rank of the machine where each action takes one unit of time: it lays weight gradients between the others."""

    def __init__(self, most_live: int) -> None:
        self.most_live = most_live
        self.now = self.live = 0
        self.program: list[Action] = []
        self.weights: deque[Action] = deque()  # that could run

    def run(self, action: Action, arrival: int) -> int:
        """Run a forward or an input gradient once its input is there; returns when it is done."""
        is_forward = action.kind is ActionKind.FORWARD
        while self.weights and (self.now < arrival or (is_forward and self.live >= self.most_live)):
            self._run_weight()
        if is_forward:
            self.live += 1
        else:
            self.weights.append(Action(ActionKind.BACKWARD_WEIGHT, action.stage, action.micro_batch))
        self.program.append(action)
        self.now = max(self.now, arrival) + 1
        return self.now

    def finish(self) -> tuple[Action, ...]:
        """The program, with the weight gradients that are left at its end."""
        while self.weights:
            self._run_weight()
        return tuple(self.program)

    def _run_weight(self) -> None:
        self.program.append(self.weights.popleft())
        self.now += 1
        self.live -= 1
