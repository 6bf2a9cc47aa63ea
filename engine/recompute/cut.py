"""The cut of the layers into stages together with the save sets: the slowest rank takes as little time as can be.

A rank's time is that of forward and backward of its layers and of computing again what their save sets drop, in a step;
every rank is within the budget. A rank that holds many micro-batches is thus given fewer layers, or recomputes more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations, pairwise

from engine.recompute.choices import TICKS
from engine.recompute.costs import LayerCost
from engine.recompute.moments import I, passes
from engine.recompute.solve import UNLIMITED, Infeasible, Solution, Solver, Stage
from parallel.pipeline.actions import Schedule
from parallel.pipeline.partition import balance, partition

IsOver = Callable[[int, range, int], bool]
"""Whether a stage that has some layers is over a limit; with more layers it is, too."""

Static = Callable[[int, Sequence[range]], int]
"""Bytes that are alive all the time on a rank (by number) whose stages have some layers: weights, gradients, optimizer
state, buffers."""


Pace = Callable[[Sequence[float], Sequence[float]], float]
"""Seconds of a step from those of each stage, for one micro-batch: forward and backward, and computing again."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in its stage a layer is, as its costs go by it: the first, the last, of one whose backward is split."""

    first: bool = False
    last: bool = False
    splits: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What there is to know of a layer.

    Attributes:
        kind: equal for layers in whose stead any other of the kind could be. costs: of its save sets, somewhere.
        seconds: of its forward and backward, of one micro-batch. output, input_gradient: bytes of what it would send if
            it were the last of a stage, and of what it would send back if it were the first.
    """

    kind: Hashable
    costs: Callable[[Place], Mapping[str, LayerCost]]
    seconds: float
    output: int = 0
    input_gradient: int = 0


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Layers on stages.

    Attributes:
        stages: the layers of each. ranks: the save sets of each. seconds: of a step, by rank: forward, backward and
            what is computed again.
    """

    stages: tuple[range, ...]
    ranks: tuple[Solution, ...]
    seconds: tuple[float, ...]


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
    def _ranks(self) -> _Ranks:
        return _Ranks(self)

    @property
    def _has_several(self) -> bool:
        count, stages = len(self.layers), self.schedule.num_stages
        if stages > count:
            raise ValueError(f"{count} layers cannot be cut into {stages} stages: each needs one at least")
        return stages > self.schedule.num_ranks


class _Ranks:
    """What ranks take with any layers; everything is solved once."""

    def __init__(self, problem: Problem) -> None:
        self.layers, self.schedule, self.budget = problem.layers, problem.schedule, problem.budget
        self._static, self._pace = problem.static, problem.pace
        self._passes = [passes(program) for program in self.schedule.ranks]
        self._splits = {a.stage for program in self.schedule.ranks for a in program if a.kind is I}
        self._sums = [0, *accumulate(round(l.seconds * TICKS) for l in self.layers)]
        self._solvers = dict[Hashable, Solver]()
        self._solved = dict[Solver, Solution | None]()

    def time(self, rank: int, stages: Sequence[range]) -> int:
        """Ticks of a step with these layers on its stages; UNLIMITED where they are not within the budget."""
        solution = self._solve(rank, stages)
        return UNLIMITED if solution is None else self._plain(rank, stages) + round(solution.seconds * TICKS)

    def is_over(self, rank: int, stages: Sequence[range], limit: int) -> bool:
        """Whether it takes longer than a limit."""
        return self._plain(rank, stages) > limit or self.time(rank, stages) > limit

    def badness(self, stages: Sequence[range]) -> tuple[float, int]:
        """Of a cut within the budget: ticks of a step, the sum of squares of the ranks' times. Infinite of another."""
        times = [self.time(rank, own) for rank, own in enumerate(self.by_rank(stages))]
        if max(times) == UNLIMITED:
            return float("inf"), 0
        return self.step(stages) * TICKS if self._pace is not None else max(times), sum(t * t for t in times)

    def step(self, stages: Sequence[range]) -> float:
        """Seconds of it, of a cut within the budget."""
        again, pace = [0.0] * len(stages), self._pace
        for rank, own in enumerate(self.by_rank(stages)):
            solution = self._solve(rank, own)
            assert solution is not None and pace is not None
            for stage, names in solution.sets.items():
                costs = zip(self._costs(stage, stages[stage]), names, strict=True)
                again[stage] = sum(of[name].seconds for of, name in costs)
        assert pace is not None
        return pace([sum(self.layers[l].seconds for l in own) for own in stages], again)

    def lack(self, stages: Sequence[range]) -> int:
        """Bytes that the worst rank has too little."""
        of = enumerate(self.by_rank(stages))
        return max(
            0 if self.time(rank, own) < UNLIMITED else self.smallest(rank, own) - self.budget for rank, own in of
        )

    def plain(self, stages: Sequence[range]) -> int:
        """The largest time of a rank without what is computed again."""
        return max(self._plain(rank, own) for rank, own in enumerate(self.by_rank(stages)))

    def worst(self, stages: Sequence[range]) -> int:
        """The rank that takes longest; of those that are not within the budget, that which lacks most."""
        of = self.by_rank(stages)
        times = [self.time(rank, own) for rank, own in enumerate(of)]
        return max(range(len(of)), key=lambda r: (times[r], self.smallest(r, of[r]) if times[r] == UNLIMITED else 0))

    def smallest(self, rank: int, stages: Sequence[range]) -> int:
        """The least budget."""
        return self._solver(rank, stages).smallest

    def cut(self, stages: Sequence[range]) -> Cut:
        """With the save sets."""
        of = self.by_rank(stages)
        solutions = [self._solve(rank, own) for rank, own in enumerate(of)]
        return Cut(
            stages=tuple(stages),
            ranks=tuple(solution for solution in solutions if solution is not None),
            seconds=tuple(self.time(rank, own) / TICKS for rank, own in enumerate(of)),
        )

    def by_rank(self, stages: Sequence[range]) -> list[list[range]]:
        """Of each rank, the layers of its stages."""
        return [[stages[s] for s in self.schedule.stages_of(rank)] for rank in range(self.schedule.num_ranks)]

    def _plain(self, rank: int, stages: Sequence[range]) -> int:
        """Ticks of forward and backward alone."""
        each = zip(self._passes[rank], stages, strict=True)
        return sum(times * (self._sums[own.stop] - self._sums[own.start]) for times, own in each)

    def _solver(self, rank: int, stages: Sequence[range]) -> Solver:
        key = rank, tuple(tuple(self.layers[l].kind for l in own) for own in stages)
        if key not in self._solvers:
            numbered = dict(zip(self.schedule.stages_of(rank), stages, strict=True))
            self._solvers[key] = Solver(
                {stage: self._costs(stage, own) for stage, own in numbered.items()},
                self.schedule.ranks[rank],
                static=self._static(rank, stages),
                messages={stage: self._messages(own) for stage, own in numbered.items()},
            )
        return self._solvers[key]

    def _costs(self, stage: int, own: range) -> Stage:
        """Of the save sets of each layer of a stage."""
        places = {
            l: Place(first=l == own.start, last=l == own.stop - 1 < len(self.layers) - 1, splits=stage in self._splits)
            for l in own
        }
        return [self.layers[l].costs(place) for l, place in places.items()]

    def _messages(self, own: range) -> tuple[int, int]:
        """Sizes of what a stage sends to both sides."""
        output = self.layers[own.stop - 1].output if own.stop < len(self.layers) else 0
        return output, self.layers[own.start].input_gradient if own.start else 0

    def _solve(self, rank: int, stages: Sequence[range]) -> Solution | None:
        solver = self._solver(rank, stages)
        if solver not in self._solved:
            try:
                self._solved[solver] = solver.within(self.budget)
            except Infeasible:
                self._solved[solver] = None
        return self._solved[solver]


def _exact(ranks: _Ranks) -> tuple[range, ...]:
    """For one stage on each rank."""
    of = ranks.schedule.stage_to_rank

    def is_over(stage: int, layers: range, limit: int) -> bool:
        return ranks.is_over(of[stage], [layers], limit)

    _check(ranks)
    return _most_even(ranks, _least(lambda limit: _last_ends(len(ranks.layers), len(of), is_over, limit), 0))


def _check(ranks: _Ranks) -> None:
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


def _most_even(ranks: _Ranks, limit: int) -> tuple[range, ...]:
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


def _search(ranks: _Ranks) -> tuple[range, ...]:
    """For several stages on a rank: from each of some cuts on, a move at a time as long as one makes it better."""
    starts = [_fitting(ranks), *(_roomy(ranks, start) for start in _even_cuts(ranks))]
    return min((_improved(ranks, start) for start in starts if not ranks.lack(start)), key=ranks.badness)


def _fitting(ranks: _Ranks) -> tuple[range, ...]:
    """A cut within the budget, the same whatever the seconds are, or Infeasible."""
    kept = [float(min(c.kept for c in l.costs(Place()).values())) for l in ranks.layers]
    found = _roomy(ranks, _even(ranks, kept))
    if lack := ranks.lack(found):
        raise Infeasible(ranks.budget, ranks.budget + lack)
    return found


def _roomy(ranks: _Ranks, best: tuple[range, ...]) -> tuple[range, ...]:
    """From a cut on, moves as long as the worst rank lacks bytes and a move makes that less."""
    least, moves = ranks.lack(best), _moves(best, ranks)
    while least and (stages := next(moves, None)) is not None:
        if (lack := ranks.lack(stages)) < least:
            least, best, moves = lack, stages, _moves(stages, ranks)
    return best


def _improved(ranks: _Ranks, best: tuple[range, ...]) -> tuple[range, ...]:
    """The best cut that moves lead to from one that is within the budget."""
    least, moves = ranks.badness(best), _moves(best, ranks)
    while (stages := next(moves, None)) is not None:
        if ranks.plain(stages) <= least[0] and (badness := ranks.badness(stages)) < least:
            least, best, moves = badness, stages, _moves(stages, ranks)
    return best


def _even_cuts(ranks: _Ranks) -> Iterator[tuple[range, ...]]:
    """By time alone, and by time with all that could be computed again."""
    yield _even(ranks, [l.seconds for l in ranks.layers])
    yield _even(ranks, [l.seconds + max(c.seconds for c in l.costs(Place()).values()) for l in ranks.layers])


def _even(ranks: _Ranks, costs: Sequence[float]) -> tuple[range, ...]:
    of = ranks.schedule
    return balance(costs, partition(costs, of.num_stages), of.stage_to_rank)


def _moves(stages: tuple[range, ...], ranks: _Ranks) -> Iterator[tuple[range, ...]]:
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
