"""What the ranks of a pipeline take with any layers on their stages, each with its best save sets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.recompute.choices import TICKS
from engine.recompute.costs import LayerCost
from engine.recompute.moments import I, passes
from engine.recompute.solve import UNLIMITED, Infeasible, Solution, Solver, Stage
from parallel.pipeline.actions import Schedule

Static = Callable[[int, Sequence[range]], int]
"""Bytes that are alive all the time on a rank (by number) whose stages have some layers: weights, gradients, optimizer
state, buffers."""


Pace = Callable[[Sequence[float], Sequence[float]], float]
"""Seconds of a step from those of each stage, for one micro-batch: forward and backward, and computing again."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in its stage a layer is, as its costs go by it: the first, the last, of one whose backward is split; and of
    a layer that something rides past, reads that or makes it: whether the stage makes it, and whether it reads it."""

    first: bool = False
    last: bool = False
    splits: bool = False
    arises: bool = False
    joined: bool = False

    @staticmethod
    def of(layer: int, stage: range, layers: int, ride: range | None, *, splits: bool = False) -> Place:
        """Of a layer, by its number among so many.

        Args:
            stage: its layers. ride: from the layer that makes what rides past this one to that which reads it.
        """
        return Place(
            first=layer == stage.start,
            last=layer == stage.stop - 1 < layers - 1,
            splits=splits,
            arises=ride is not None and ride.start in stage,
            joined=ride is not None and ride.stop - 1 in stage,
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What there is to know of a layer.

    Attributes:
        kind: equal for layers in whose stead any other of the kind could be. costs: of its save sets, somewhere.
        ride: from the layer that makes what rides past this one to that which reads it, if anything does.
        seconds: of its forward and backward, of one micro-batch. output, input_gradient: bytes of what it would send if
            it were the last of a stage, and of what it would send back if it were the first.
    """

    kind: Hashable
    costs: Callable[[Place], Mapping[str, LayerCost]]
    seconds: float
    output: int = 0
    input_gradient: int = 0
    ride: range | None = None


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


class Ranks:
    """What ranks take with any layers; everything is solved once."""

    def __init__(
        self, layers: Sequence[Layer], schedule: Schedule, budget: int, static: Static, pace: Pace | None
    ) -> None:
        self.layers, self.schedule, self.budget = layers, schedule, budget
        self._static, self._pace = static, pace
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
        places = {l: Place.of(l, own, len(self.layers), self.layers[l].ride, splits=stage in self._splits) for l in own}
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
