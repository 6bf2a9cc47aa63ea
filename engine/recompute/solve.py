"""Which save set each layer of a rank gets: the least time of computing again, within a budget of bytes, exactly.

The peak of a rank is the most that is alive while any action of its program runs (`engine.recompute.peaks`), scratch of
recomputation, gradients, messages and other micro-batches included; the time is that of all micro-batches of a step. Of
assignments that take equally long the one with the least peak is taken, so that with a larger budget the time is never
longer and the peak never lower; of those, one in which equal layers that come first keep least, since what they keep
lives longest. Times are counted in whole picoseconds; else nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.recompute.choices import TICKS, Rank, choices_of
from engine.recompute.costs import LayerCost
from engine.recompute.moments import B, I, Messages, R, moments, passes
from engine.recompute.peaks import StageCost, fullest
from engine.recompute.search import Found, Search
from parallel.pipeline.actions import Action

UNLIMITED = 2**60
"""A budget that anything is within."""

Stage = Sequence[Mapping[str, LayerCost]]
"""Of each layer, what each save set costs that it may have."""


class Infeasible(ValueError):
    """A budget that no assignment stays within.

    Attributes:
        smallest: the least budget that one does, in bytes.
    """

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(
            f"no save sets of the layers keep a rank within {budget:,} bytes: the least that can be is {smallest:,}"
        )
        self.smallest = smallest


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Of one rank.

    Attributes:
        sets: by stage, the name of each layer's save set. peak: bytes, what is alive all the time included. seconds:
            that a step computes again.
    """

    sets: dict[int, tuple[str, ...]]
    peak: int
    seconds: float


def solve(
    stages: Mapping[int, Stage],
    program: Sequence[Action],
    *,
    static: int = 0,
    messages: Messages | None = None,
    budget: int,
) -> Solution:
    """The assignment of save sets with the least time whose peak is within a budget.

    Args:
        stages: that a rank holds, by number. program: of the rank. static: bytes that are alive all the time.
            messages: as of `engine.recompute.moments`.

    Raises:
        Infeasible: there is none.
        ValueError: the stages are not those of the program, a layer has no choice, a cost is negative, or the program
            has no backward or recomputes by itself.
    """
    return Solver(stages, program, static=static, messages=messages).within(budget)


def front(
    stages: Mapping[int, Stage],
    program: Sequence[Action],
    *,
    static: int = 0,
    messages: Messages | None = None,
    points: int | None = None,
) -> tuple[Solution, ...]:
    """Solutions that none is better than in both peak and time, from the least peak to the least time.

    Args:
        points: solve for so many budgets, evenly between both ends, at least 2; None finds every solution there is.

    Raises:
        ValueError: as `solve`.
    """
    solver = Solver(stages, program, static=static, messages=messages)
    found = [solver.within(UNLIMITED)]
    span = found[0].peak - solver.smallest
    while (room := found[-1].peak - solver.smallest) > 0:
        lower = room - 1 if points is None else (-(-room * (points - 1) // span) - 1) * span // (points - 1)
        found.append(solver.within(solver.smallest + lower))
    return tuple(reversed(found))


class Solver:
    """Of one rank, for any number of budgets; arguments and errors as of `solve`."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        program: Sequence[Action],
        *,
        static: int = 0,
        messages: Messages | None = None,
    ) -> None:
        self.stages, self.static = {stage: stages[stage] for stage in sorted(stages)}, static
        if set(stages) != (of := {a.stage for a in program if a.kind.is_compute}):
            raise ValueError(f"costs are given of stages {sorted(stages)}, and the program is of stages {sorted(of)}")
        if not any(a.kind in (B, I) for a in program) or any(a.kind is R for a in program):
            raise ValueError(
                "save sets are chosen for a program with forwards and backwards and no RECOMPUTE: give that"
            )
        self._moments, self._passes = moments(program, messages), passes(program)
        self._search = Search(Rank(choices_of(list(self.stages.values()), self._passes), self._moments))
        self._smallest: int | None = None

    def within(self, budget: int) -> Solution:
        """As `solve`."""
        found = self._search.within(budget - self.static)
        if found is None:
            raise Infeasible(budget, self.smallest)
        return self._solution(found)

    @property
    def smallest(self) -> int:
        """The least budget that can be met."""
        if self._smallest is None:
            free = [
                [{name: replace(cost, seconds=0.0) for name, cost in layer.items()} for layer in layers]
                for layers in self.stages.values()
            ]
            found = Search(Rank(choices_of(free, self._passes), self._moments)).within(UNLIMITED)
            assert found is not None
            self._smallest = found.peak + self.static
        return self._smallest

    def _solution(self, found: Found) -> Solution:
        """With equal layers in the order of what they keep, where the peak allows."""
        rank, choices = self._search.rank, list(found.choices)
        for stage in range(len(self.stages)):
            for first, last in rank.runs(stage):
                ordered = [*choices[:first], *sorted(choices[first : last + 1]), *choices[last + 1 :]]
                choices = ordered if self._peak(ordered) <= found.peak else choices
        assert self._peak(choices) == found.peak, "the peak is that of the assignment"
        return Solution(sets=self._names(choices), peak=found.peak + self.static, seconds=found.time / TICKS)

    def _names(self, choices: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Of the save sets, by stage."""
        names = iter(of.names[choice] for of, choice in zip(self._search.rank.layers, choices, strict=True))
        return {stage: tuple(next(names) for _ in layers) for stage, layers in self.stages.items()}

    def _peak(self, choices: Sequence[int]) -> int:
        """Beside what is alive all the time."""
        names = self._names(choices)
        costs = [[layer[name] for layer, name in zip(self.stages[s], names[s], strict=True)] for s in self.stages]
        return fullest([StageCost(layers=tuple(layers)) for layers in costs], self._moments)
