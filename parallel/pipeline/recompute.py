"""Where a schedule recomputes (R): where a rank would wait, and what its stages have dropped is wanted next.

A backward computes again what its stage has dropped (`engine.recompute`); an R does so before the gradient comes, and
the backward, which others wait for, takes so much less. What is recomputed takes the memory that dropping it has saved,
until its backward is over, so no more than a few micro-batches of a rank are at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from parallel.pipeline.actions import Action, ActionKind, Schedule, no_search_for_cycles
from parallel.pipeline.costs import Costs, spread
from parallel.pipeline.progress import Progress

_BACKWARDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
_AT_ONCE = 1e-9  # of the time so far: a wait that is no longer is none, however sums were rounded


@no_search_for_cycles()
def with_recompute(schedule: Schedule, costs: Costs, *, ahead: int = 1) -> Schedule:
    """The schedule with an R for each micro-batch that can be recomputed while its rank waits.

    It takes never longer than without, by the simulator in the order of the program: a rank that would wait for the
    gradient of a stage recomputes it meanwhile, which had to be done then or later; and those whose backwards come
    next, or while it waits for something else, only if that is over before what it waits for comes. So nothing anywhere
    is later than it was. Under `ready` the R are taken as they come (`readiness.py`).

    Args:
        schedule: validated, with messages or without. costs: `recompute` is 0 of stages that drop nothing.
        ahead: micro-batches, of one stage each, that lie recomputed on a rank at a time, at most.

    Raises:
        ScheduleError: the schedule can make no progress. ValueError: it has an R already; `ahead` is below 1.
    """
    if schedule.recomputes:
        raise ValueError(f"schedule {schedule.name!r} has recomputes (R) already: leave them as they are")
    if ahead < 1:
        raise ValueError(f"{ahead} micro-batches recomputed ahead: 1 or more")
    if schedule.is_forward_only or not any(spread(costs.recompute, schedule.num_stages)):
        return schedule
    filled = _Filled(schedule, costs, ahead)
    filled.require_complete()
    return replace(schedule, ranks=tuple(map(_inserted, schedule.ranks, filled.recomputes)))


def _inserted(program: Sequence[Action], recomputes: Sequence[tuple[int, Action]]) -> tuple[Action, ...]:
    """A program with actions before those at the positions that are given, ascending."""
    found, done = list[Action](), 0
    for position, action in recomputes:
        found += [*program[done:position], action]
        done = position
    return (*found, *program[done:])


class _Filled(Progress):
    """Ranks that recompute while they wait.

    Attributes:
        recomputes: of each rank, before the action at which position.
    """

    def __init__(self, schedule: Schedule, costs: Costs, ahead: int) -> None:
        self._most = ahead
        self.recomputes: list[list[tuple[int, Action]]] = [[] for _ in schedule.ranks]
        self._again = costs.durations(schedule)[ActionKind.RECOMPUTE]
        # Without what it computes again; the jitter draws the same.
        self._alone = replace(costs, recompute=0.0).durations(schedule)
        # Positions of the backwards that have something to compute again, and which of these is looked at next.
        m = schedule.num_micro_batches
        self._backwards = [
            [n for n, a in enumerate(p) if a.kind in _BACKWARDS and self._again[a.stage * m + (a.micro_batch or 0)] > 0]
            for p in schedule.ranks
        ]
        self._next = [0] * schedule.num_ranks
        super().__init__(schedule, costs)

    def _wait(self, rank: int, position: int, clock: float, until: float) -> float:
        program, backwards = self.schedule.ranks[rank], self._backwards[rank]
        if until - clock <= _AT_ONCE * until:
            return until
        first = bisect_left(backwards, position)
        place = max(self._next[rank], first)
        while place < min(len(backwards), first + self._most):
            at = backwards[place]
            action = program[at]
            index = action.stage * self._m + action.micro_batch  # type: ignore[operator]
            if self._when[index] is None:  # its forward is to come
                break
            if clock + self._again[index] > until and at != position:
                break
            clock += self._again[index]
            self.recomputes[rank].append((position, Action(ActionKind.RECOMPUTE, action.stage, action.micro_batch)))
            self._plans[action.kind][action.stage][-1][index] = self._alone[action.kind][index]
            place += 1
        self._next[rank] = place
        return max(clock, until)
