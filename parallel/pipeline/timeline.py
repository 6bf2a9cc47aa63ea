"""What a simulated step looks like: when each action ran and each message was under way, and what follows from that."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import sub

from parallel.pipeline.actions import Action, ActionKind, Schedule, alive_changes
from parallel.pipeline.costs import Costs, spread

_GROW = (ActionKind.RECOMPUTE, ActionKind.BACKWARD_INPUT)  # after these what was dropped is there


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One compute action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message and when it was under way."""

    receive: Action
    """Names it: what it is for the rank that gets it."""
    source: int
    """The rank that sends it."""
    target: int
    """The rank that gets it."""
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step. It ends with the gradient norm, which waits for all ranks, and the optimizer.

    Actions are kept as programs and arrays of times; `ranks` and `messages` make objects of them when asked.
    """

    schedule: Schedule
    costs: Costs
    programs: tuple[Sequence[Action], ...]
    """The compute actions of each rank in the order in which they ran."""
    starts: Sequence[array[float]]
    ends: Sequence[array[float]]
    passed: Callable[[], tuple[Message, ...]] = field(repr=False)

    @cached_property
    def ranks(self) -> tuple[tuple[Interval, ...], ...]:
        """The compute actions of each rank in order, with their times."""
        return tuple(
            tuple(Interval(action=a, start=start, end=end) for a, start, end in zip(*row, strict=True))
            for row in zip(self.programs, self.starts, self.ends, strict=True)
        )

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """All messages by their end; none for a compute order, whose links are ideal."""
        return self.passed()

    @cached_property
    def makespan(self) -> float:
        """Time from the start to the end of the last compute action."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @cached_property
    def optimizer(self) -> tuple[float, ...]:
        """Time of each rank's update."""
        times = spread(self.costs.optimizer, self.schedule.num_ranks)
        return tuple(time / speed for time, speed in zip(times, spread(self.costs.speed, len(times)), strict=True))

    @property
    def step_time(self) -> float:
        """Until the slowest rank has made its update."""
        return self.makespan + self.costs.norm + max(self.optimizer)

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """Idle time of each rank within the step: before, between and after its actions (`barrier_wait` is a part)."""
        rest = self.step_time - self.costs.norm
        rows = zip(self.starts, self.ends, self.optimizer, strict=True)
        return tuple(rest - sum(map(sub, ends, starts)) - optimizer for starts, ends, optimizer in rows)

    @property
    def barrier_wait(self) -> tuple[float, ...]:
        """Time of each rank from its last compute action until the norm can begin."""
        return tuple(self.makespan - (ends[-1] if ends else 0.0) for ends in self.ends)

    @property
    def bubble_fraction(self) -> float:
        """Share of all ranks' time that is idle, 0 to 1."""
        total = self.step_time * self.schedule.num_ranks
        return sum(self.bubble) / total if total > 0 else 0.0

    def live_activations(self, rank: int) -> list[int]:
        """Activations, each of one stage, that a rank keeps after each of its actions."""
        return list(accumulate(alive_changes(self.schedule, self.programs[rank])))

    def live_bytes(self, rank: int) -> list[float]:
        """The same in bytes, by `Costs.activation_bytes` and `recomputed_bytes`."""
        sizes, again = (
            spread(of, self.schedule.num_stages) for of in (self.costs.activation_bytes, self.costs.recomputed_bytes)
        )
        changes = alive_changes(self.schedule, self.programs[rank])
        grown = set[tuple[int, int | None]]()  # what is as large as before it was dropped
        alive, found = 0.0, list[float]()
        for change, action in zip(changes, self.programs[rank], strict=True):
            key, alive = (action.stage, action.micro_batch), alive + change * sizes[action.stage]
            if action.kind in _GROW and key not in grown:
                grown.add(key)
                alive += again[action.stage]
            elif change < 0 and key in grown:
                alive -= again[action.stage]
            found.append(alive)
        return found

    @cached_property
    def peak_activations(self) -> tuple[float, ...]:
        """Most activations alive at once per rank; 1 is its share of one micro-batch, all its stages together."""
        ranks = range(self.schedule.num_ranks)
        return tuple(max(self.live_activations(r), default=0) / len(self.schedule.stages_of(r)) for r in ranks)

    @cached_property
    def peak_bytes(self) -> tuple[float, ...]:
        """Most bytes of activations alive at once per rank."""
        return tuple(max(self.live_bytes(rank), default=0.0) for rank in range(self.schedule.num_ranks))

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
        summary = f"time {self.step_time:g}, bubble {self.bubble_fraction:.1%}, peak activations per rank {peaks}"
        return f"{self.render()}\n{summary}"
