"""The cut of the layers into stages together with the save sets: the slowest rank takes as little time as can be.

A rank's time is that of forward and backward of its layers and of computing again what their save sets drop, in a step;
every rank is within the budget. A rank that holds many micro-batches is thus given fewer layers, or recomputes more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

from engine.recompute.ranks import Cut, Layer, Pace, Place, Ranks, Static
from engine.recompute.solve import Infeasible
from parallel.pipeline.actions import Schedule
from parallel.pipeline.partition import balance, partition

IsOver = Callable[[int, range, int], bool]
"""Whether a stage that has some layers is over a limit; with more layers it is, too."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be cut: layers, for the ranks of a schedule, which have a budget of bytes.

    Attributes:
        pace: what a step takes where ranks have several stages, which wait for each other in many ways, no less than
            the busiest rank; None: as long as that.
    """

    layers: Sequence[Layer]
    schedule: Schedule
    budget: int
    static: Static
    pace: Pace | None = None

    def best(self) -> Cut:
        """The cut and the save sets with which the largest time of a rank is least, every rank within the budget.

        With one stage on each rank that is exact, if a stage with more layers never takes less (as where all boundaries
        are alike), and of the best cuts the one with the least sum of squares is taken. With several it is the best
        that a search finds that moves one or two ends of stages by a layer at a time, from even cuts on, by the step's
        `pace`: there may be a better one, though tests against every cut found none. The save sets of the cut are
        exact.

        Raises:
            Infeasible: no cut is within the budget (with several stages on a rank: none was found).
            ValueError: there are fewer layers than stages, or as of `engine.recompute.solve.solve`.
        """
        ranks = self._ranks
        return ranks.cut(_search(ranks) if self._has_several else _exact(ranks))

    def check(self) -> None:
        """Raise Infeasible where `best` would, whatever the seconds are."""
        if self._has_several:
            _fitting(self._ranks)
        else:
            _check(self._ranks)

    def solved(self, stages: Sequence[range]) -> Cut:
        """With these layers on the stages, the save sets with which each rank takes least.

        Raises:
            Infeasible: as soon as one rank cannot be within the budget; `smallest` is that of the worst.
        """
        if lack := self._ranks.lack(stages):
            raise Infeasible(self.budget, self.budget + lack)
        return self._ranks.cut(stages)

    def step(self, found: Cut) -> float:
        """Seconds of it by the pace."""
        return self._ranks.step(found.stages)

    def best_of(self, found: Cut, stages: Sequence[range]) -> Cut:
        """Of a cut that was found and another, which may not be within the budget, the one by whose pace a step takes
        less."""
        ranks = self._ranks
        if tuple(stages) == found.stages or ranks.lack(stages) or ranks.step(stages) > ranks.step(found.stages):
            return found
        return ranks.cut(stages)

    @cached_property
    def _ranks(self) -> Ranks:
        return Ranks(self.layers, self.schedule, self.budget, self.static, self.pace)

    @property
    def _has_several(self) -> bool:
        count, stages = len(self.layers), self.schedule.num_stages
        if stages > count:
            raise ValueError(f"{count} layers cannot be cut into {stages} stages: each needs one at least")
        return stages > self.schedule.num_ranks


def _exact(ranks: Ranks) -> tuple[range, ...]:
    """For one stage on each rank."""
    of = ranks.schedule.stage_to_rank

    def is_over(stage: int, layers: range, limit: int) -> bool:
        return ranks.is_over(of[stage], [layers], limit)

    _check(ranks)
    return _most_even(ranks, _least(lambda limit: _last_ends(len(ranks.layers), len(of), is_over, limit), 0))


def _check(ranks: Ranks) -> None:
    """Raise Infeasible where no cut with one stage on each rank is within the budget."""
    of = ranks.schedule.stage_to_rank

    def needs_more(stage: int, layers: range, limit: int) -> bool:
        return ranks.smallest(of[stage], [layers]) > limit

    def fits(limit: int) -> list[int] | None:
        return _last_ends(len(ranks.layers), len(of), needs_more, limit)

    if fits(ranks.budget) is None:
        raise Infeasible(ranks.budget, _least(fits, ranks.budget))


def _least(fits: Callable[[int], object | None], low: int) -> int:
    """The least limit, from a low one on, that is met: once one is met, all larger ones are."""
    high = low + 1
    while fits(high) is None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) is None else (low, middle)
    return high


def _last_ends(layers: int, stages: int, is_over: IsOver, limit: int) -> list[int] | None:
    """The last layer that each stage can end before, so that none is over a limit; None where that cannot be.

    Stages are filled from the first one on: with fewer layers none is over that was not.
    """
    ends = [0]
    for stage in range(stages):
        start, most = ends[-1], layers - (stages - stage - 1)
        fitting = bisect_left(
            range(start + 1, most + 1),
            True,
            key=lambda end: is_over(stage, range(start, end), limit),
        )
        if not fitting:
            return None
        ends.append(start + fitting)
    return ends[1:] if ends[-1] == layers else None


def _first_ends(layers: int, stages: int, is_over: IsOver, limit: int) -> list[int]:
    """The first that each can end before, if there is a cut."""

    def mirrored(stage: int, back: range, limit: int) -> bool:
        return is_over(stages - 1 - stage, range(layers - back.stop, layers - back.start), limit)

    starts = _last_ends(layers, stages, mirrored, limit)
    assert starts is not None, "there is a cut"
    return [layers - start for start in reversed(starts[:-1])] + [layers]


def _most_even(ranks: Ranks, limit: int) -> tuple[range, ...]:
    """The cut with the least sum of squared times of those where no rank takes longer than a limit; one stage each."""
    of, layers = ranks.schedule.stage_to_rank, len(ranks.layers)

    def is_over(stage: int, layers: range, limit: int) -> bool:
        return ranks.is_over(of[stage], [layers], limit)

    first, last = _first_ends(layers, len(of), is_over, limit), _last_ends(layers, len(of), is_over, limit)
    assert last is not None, "there is a cut"
    best: dict[int, tuple[int, tuple[int, ...]]] = {
        0: (0, (0,))
    }  # where the next stage begins: the sum, the ends so far
    for stage, ends in enumerate(zip(first, last, strict=True)):
        longer = dict[int, tuple[int, tuple[int, ...]]]()
        for end in range(ends[0], ends[1] + 1):
            sums = [
                (total + ranks.time(of[stage], [range(start, end)]) ** 2, (*before, end))
                for start, (total, before) in best.items()
                if start < end and not ranks.is_over(of[stage], [range(start, end)], limit)
            ]
            if sums:
                longer[end] = min(sums)
        best = longer
    return tuple(range(*ends) for ends in pairwise(best[layers][1]))


def _search(ranks: Ranks) -> tuple[range, ...]:
    """For several stages on a rank: from each of some cuts on, a move at a time as long as one makes it better."""
    starts = [_fitting(ranks), *(_roomy(ranks, start) for start in _even_cuts(ranks))]
    return min((_improved(ranks, start) for start in starts if not ranks.lack(start)), key=ranks.badness)


def _fitting(ranks: Ranks) -> tuple[range, ...]:
    """A cut within the budget, the same whatever the seconds are, or Infeasible."""
    kept = [float(min(c.kept for c in l.costs(Place()).values())) for l in ranks.layers]
    found = _roomy(ranks, _even(ranks, kept))
    if lack := ranks.lack(found):
        raise Infeasible(ranks.budget, ranks.budget + lack)
    return found


def _roomy(ranks: Ranks, best: tuple[range, ...]) -> tuple[range, ...]:
    """From a cut on, moves as long as the worst rank lacks bytes and a move makes that less."""
    least, moves = ranks.lack(best), _moves(best, ranks)
    while least and (stages := next(moves, None)) is not None:
        if (lack := ranks.lack(stages)) < least:
            least, best, moves = lack, stages, _moves(stages, ranks)
    return best


def _improved(ranks: Ranks, best: tuple[range, ...]) -> tuple[range, ...]:
    """The best cut that moves lead to from one that is within the budget."""
    least, moves = ranks.badness(best), _moves(best, ranks)
    while (stages := next(moves, None)) is not None:
        if ranks.plain(stages) <= least[0] and (badness := ranks.badness(stages)) < least:
            least, best, moves = badness, stages, _moves(stages, ranks)
    return best


def _even_cuts(ranks: Ranks) -> Iterator[tuple[range, ...]]:
    """By time alone, and by time with all that could be computed again."""
    yield _even(ranks, [l.seconds for l in ranks.layers])
    yield _even(ranks, [l.seconds + max(c.seconds for c in l.costs(Place()).values()) for l in ranks.layers])


def _even(ranks: Ranks, costs: Sequence[float]) -> tuple[range, ...]:
    of = ranks.schedule
    return balance(costs, partition(costs, of.num_stages), of.stage_to_rank)


def _moves(stages: tuple[range, ...], ranks: Ranks) -> Iterator[tuple[range, ...]]:
    """A layer from the worst rank to a stage of another, those between shift; or one end, or two, move by one layer."""
    ends, worst, of = [stage.stop for stage in stages[:-1]], ranks.worst(stages), ranks.schedule.stage_to_rank
    shifts = [
        [
            (1 if taker < giver else -1) if min(giver, taker) <= end < max(giver, taker) else 0
            for end in range(len(ends))
        ]
        for giver in ranks.schedule.stages_of(worst)
        for taker in sorted(range(len(stages)), key=lambda stage: abs(stage - giver))
        if of[taker] != worst
    ]
    steps = [(end, step) for end in range(len(ends)) for step in (-1, 1)]
    for some in [*((step,) for step in steps), *combinations(steps, 2)]:
        shifts.append([sum(step for at, step in some if at == end) for end in range(len(ends))])
    for shift in shifts:
        moved = [0, *(end + step for end, step in zip(ends, shift, strict=True)), len(ranks.layers)]
        if all(a < b for a, b in pairwise(moved)):
            yield tuple(range(a, b) for a, b in pairwise(moved))
