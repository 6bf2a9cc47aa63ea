"""The simulator: when each action of a schedule runs, given what actions cost.

Every action starts as soon as the one before it on its rank is done and its input is there, so the times are the
longest paths through the dependency graph. Units of time are the caller's: seconds, or multiples of a forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from parallel.pipeline.actions import Action, ActionKind, Place, Schedule, peak_activations
from parallel.pipeline.graph import Arrival, Graph, Node, dependency_graph, execution_order

PerStage = float | tuple[float, ...]
"""One number for all stages, or one per stage."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time of each kind of action per stage and micro-batch; the whole backward takes the sum of its two parts.

    Raises:
        ValueError: a time is negative or not finite.
    """

    forward: PerStage = 1.0
    backward_input: PerStage = 1.0
    backward_weight: PerStage = 1.0
    recompute: PerStage = 1.0
    latency: float = 0.0
    """Time of one message, from the moment both ends have posted it; messages of a pair of ranks pass one by one."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for time in value if isinstance(value, tuple) else (value,):
                if not (math.isfinite(time) and time >= 0):
                    raise ValueError(f"costs: {field.name} is {value}, but times are finite and not negative")

    def check_stages(self, num_stages: int) -> None:
        """Raise ValueError unless every per-stage tuple has one time for each stage."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != num_stages:
                raise ValueError(f"costs: {field.name} has {len(value)} times for {num_stages} stages")

    def duration(self, action: Action) -> float:
        """Time that an action keeps its rank busy; communication and reserved actions run beside and take none."""

        def of(cost: PerStage) -> float:
            return cost[action.stage] if isinstance(cost, tuple) else cost

        match action.kind:
            case ActionKind.FORWARD:
                return of(self.forward)
            case ActionKind.BACKWARD:
                return of(self.backward_input) + of(self.backward_weight)
            case ActionKind.BACKWARD_INPUT:
                return of(self.backward_input)
            case ActionKind.BACKWARD_WEIGHT:
                return of(self.backward_weight)
            case ActionKind.RECOMPUTE:
                return of(self.recompute)
            case _:
                return 0.0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One compute action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a simulated step looks like."""

    ranks: tuple[tuple[Interval, ...], ...]
    """The compute actions of each rank in order."""
    peak_activations: tuple[float, ...]
    """Most activations alive at once per rank; 1 is the rank's share of one micro-batch, all its stages together."""

    @property
    def makespan(self) -> float:
        """Time from the start to the end of the last compute action."""
        return max((intervals[-1].end for intervals in self.ranks if intervals), default=0.0)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Idle time of each rank within the makespan."""
        return tuple(self.makespan - sum(i.end - i.start for i in intervals) for intervals in self.ranks)

    @property
    def bubble_fraction(self) -> float:
        """Share of all ranks' time that is idle, 0 to 1."""
        total = self.makespan * len(self.ranks)
        return sum(self.bubble) / total if total > 0 else 0.0

    def render(self, columns: int | None = None) -> str:
        """A picture in text: one row per rank, time to the right, ``F3---`` an action (of stage 2: ``2F3--`` where
        ranks hold several stages), dots for idle time.

        The width is chosen so that the shortest action shows its label, unless ``columns`` is given.
        """
        stages = {i.action.stage for intervals in self.ranks for i in intervals}
        skip_stage = len(stages) <= len(self.ranks)
        shown = [
            [(str(i.action).removeprefix(str(i.action.stage)) if skip_stage else str(i.action), i) for i in intervals]
            for intervals in self.ranks
        ]
        if columns is None:
            widths = ((len(label) + 1) / (i.end - i.start) for row in shown for label, i in row if i.end > i.start)
            scale = max(widths, default=0.0)
        else:
            scale = columns / self.makespan if self.makespan > 0 else 0.0

        def column(time: float) -> int:
            return int(time * scale + 0.5)  # not round(): halves must go one way, or equal actions differ in width

        prefix = len(f"rank {len(self.ranks) - 1}")
        lines = []
        for rank, row in enumerate(shown):
            line = ["."] * column(self.makespan)
            for label, interval in row:
                start, end = column(interval.start), column(interval.end)
                width = max(end - start - 1, 1)  # one column stays blank, to part it from the next action
                line[start:end] = label[:width].ljust(width, "-").ljust(end - start)[: end - start]
            lines.append(f"{f'rank {rank}':<{prefix}} |{''.join(line)}|")
        return "\n".join(lines)

    def __str__(self) -> str:
        peaks = " ".join(f"{peak:g}" for peak in self.peak_activations)
        summary = f"time {self.makespan:g}, bubble {self.bubble_fraction:.1%}, peak activations per rank {peaks}"
        return f"{self.render()}\n{summary}"


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a schedule on paper.

    A compute order without communication runs on ideal links: no message queues, or waits for its receive.

    Raises:
        ScheduleError: the schedule can make no progress.
        ValueError: the costs are for another number of stages.
    """
    times = earliest_times(schedule, dependency_graph(schedule), costs)
    ranks = tuple(
        tuple(
            Interval(action=action, start=times[Place(rank, i)][0], end=times[Place(rank, i)][1])
            for i, action in enumerate(program)
            if action.kind.is_compute
        )
        for rank, program in enumerate(schedule.ranks)
    )
    return Timeline(ranks=ranks, peak_activations=peak_activations(schedule))


def earliest_times(schedule: Schedule, graph: Graph, costs: Costs) -> dict[Node, tuple[float, float]]:
    """Start and end of each node when everything runs as soon as it can, in an order of execution.

    Raises:
        ScheduleError, ValueError: as `simulate`.
    """
    costs.check_stages(schedule.num_stages)
    times: dict[Node, tuple[float, float]] = {}
    for node in execution_order(schedule, graph):
        start = max((times[before][1] for before in graph[node]), default=0.0)
        if isinstance(node, Arrival):
            duration = costs.latency
        else:
            duration = costs.duration(schedule.ranks[node.rank][node.position])
        times[node] = (start, start + duration)
    return times
