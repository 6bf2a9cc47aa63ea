"""When a rank did what: it listens to the rank's whereabouts (parallel.heartbeat).

Of each pass over a schedule it knows when the compute actions ran, from which the measured bubble follows; of a step
that is recorded all else as well: waits, messages, collectives, phases.

What a compute action takes from other ranks it takes before it computes. So its start is the moment when it has, waited
for or not, and all from then on until the next action counts as busy, collectives within it and reading of images too.
Stamps are nanoseconds of the host's monotonic clock; on CUDA, where actions are launches, they are events on the
current stream, which are turned into such nanoseconds when the step is over (that has not run on a GPU yet).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.heartbeat import Described
from parallel.pipeline.actions import Action

_MESSAGES = ("send", "recv")


class Clock(Protocol):
    """Where stamps come from."""

    def start(self) -> None:
        """Before the stamps of a step."""

    def stamp(self) -> Any:
        """This moment."""

    def settle(self) -> None:
        """Until this returns, stamps may not have come about."""

    def nanoseconds(self, stamp: Any) -> int:
        """Of the host's monotonic clock."""


class HostClock:
    """Stamps are nanoseconds of the monotonic clock, which processes of one host share."""

    stamp = staticmethod(time.perf_counter_ns)

    def start(self) -> None:
        """Nothing is to be done."""

    def settle(self) -> None:
        """Nothing is to be waited for."""

    def nanoseconds(self, stamp: int) -> int:
        """The stamp itself."""
        return stamp


class CudaClock:
    """Stamps are events on the current stream, timed from one whose moment the host knows."""

    def start(self) -> None:
        """Wait for the GPU, and tie the event that others are timed from to the host's clock."""
        torch.cuda.synchronize()
        self._origin = self.stamp()
        torch.cuda.synchronize()
        self._began = time.perf_counter_ns()

    def stamp(self) -> torch.cuda.Event:
        """An event, recorded."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def nanoseconds(self, stamp: torch.cuda.Event) -> int:
        """Of the host's clock, to the half microsecond to which events are timed."""
        return self._began + round(1e6 * self._origin.elapsed_time(stamp))


class Slice(NamedTuple):
    """Something that took time.

    Attributes:
        what: an action, a phase such as `optimizer`, or the kind of a collective. start, end: stamps.
        size: bytes that a collective hands over, None where it hands over nothing. axis: of a collective.
    """

    what: Any
    start: Any
    end: Any
    size: int | None = None
    axis: str | None = None


@dataclass
class StepRecord:
    """All that a rank did in a step.

    Attributes:
        computed: compute actions, without the waits before them. waits: for messages, by the action that waited.
        messages: sends and receives, while they are posted. phases: all else that is done, also within an action, and
            waiting for whichever action is ready first.
        calls: collectives: each once when it is started, and once as `wait ...`. missing: of these, for want of room.
    """

    step: int
    computed: list[Slice] = field(default_factory=list)
    waits: list[Slice] = field(default_factory=list)
    messages: list[Slice] = field(default_factory=list)
    phases: list[Slice] = field(default_factory=list)
    calls: list[Slice] = field(default_factory=list)
    missing: int = 0

    @property
    def lists(self) -> tuple[list[Slice], ...]:
        """All slices."""
        return self.computed, self.waits, self.messages, self.phases, self.calls

    @property
    def span(self) -> tuple[int, int] | None:
        """Where its first slice begins and its last one ends."""
        slices = [s for slices in self.lists for s in slices]
        return (min(s.start for s in slices), max(s.end for s in slices)) if slices else None

    def __len__(self) -> int:
        return sum(map(len, self.lists))


class Recorder:
    """Hears what a rank is at. Set as `Whereabouts.listener` while it is to.

    Attributes:
        computed: compute actions of the last pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
        self.stamp = self.clock.stamp
        self.computed: list[Slice] = []
        self._record: StepRecord | None = None
        self._room = 0
        self._doing: Any = None
        self._since: Any = None
        self._entered: list[tuple[Any, Any]] = []

    @property
    def is_recording(self) -> bool:
        """Whether a step is recorded, and not only a pass timed."""
        return self._record is not None

    def begin_step(self, step: int, room: int) -> None:
        """Record all from now on. room: most collectives to keep."""
        self.clock.start()
        self._record, self._room = StepRecord(step), room
        self._doing, self._entered = None, []

    def end_step(self) -> StepRecord:
        """What was recorded, stamps as nanoseconds."""
        assert self._record is not None
        self.now(None)
        record, self._record = self._record, None
        self.clock.settle()
        lists = {
            name: [s._replace(start=self._ns(s.start), end=self._ns(s.end)) for s in getattr(record, name)]
            for name in ("computed", "waits", "messages", "phases", "calls")
        }
        return StepRecord(record.step, missing=record.missing, **lists)

    def begin_pass(self) -> None:
        """Forget the compute actions of the pass before."""
        self.computed = []
        self._doing, self._entered = None, []
        if self._record is not None:
            self._record.computed = self.computed

    def busy(self) -> tuple[float, float, float]:
        """Of the last pass: seconds spent in compute actions; start of the first and end of the last, in seconds of the
        host's clock.
        """
        self.clock.settle()
        times = [(self._ns(s.start), self._ns(s.end)) for s in self.computed]
        if not times:
            return 0.0, 0.0, 0.0
        return sum(end - start for start, end in times) / 1e9, times[0][0] / 1e9, times[-1][1] / 1e9

    # -- what Whereabouts and parallel.comm tell ----------------------------------------------------------------------

    def now(self, doing: str | Described | None) -> None:
        """What was done ends here; `doing` begins."""
        moment = self.stamp()
        before, record = self._doing, self._record
        if isinstance(before, Action) and before.kind.is_compute:
            self.computed.append(Slice(before, self._since, moment))
        elif before is not None and record is not None:
            is_message = isinstance(before, Action) and before.kind.is_message
            (record.messages if is_message else record.phases).append(Slice(before, self._since, moment))
        self._doing, self._since = doing, moment

    def arrived(self) -> None:
        """A compute action begins to compute."""
        self._since = self.stamp()

    def enter(self, doing: str | Described | None) -> None:
        """Something within begins."""
        self._entered.append((doing, self.stamp()))

    def leave(self) -> None:
        """It ends."""
        if not self._entered:  # it began before anybody listened
            return
        doing, began = self._entered.pop()
        if self._record is not None and doing is not None:
            self._record.phases.append(Slice(doing, began, self.stamp()))

    def watched(self, kind: str, axis: Any, began: Any, size: int | None) -> None:
        """A message was posted (`size` bytes) or waited for (None), or a collective started or waited for."""
        moment, record = self.stamp(), self._record
        if kind in _MESSAGES:
            if size is None and isinstance(self._doing, Action) and record is not None:
                record.waits.append(Slice(self._doing, began, moment))
        elif record is not None and len(record.calls) < self._room:
            name = kind if size is not None else f"wait {kind}"
            record.calls.append(Slice(name, began, moment, size, axis.name))
        elif record is not None:
            record.missing += 1

    def _ns(self, stamp: Any) -> int:
        return self.clock.nanoseconds(stamp)


def bubble_share(figures: Tensor) -> float:
    """Share of the pass in which ranks did not compute: 1 - sum of busy time / (ranks x duration of the pass).

    The pass of a pipeline is from the start of the first compute action on any of its ranks to the end of the last, as
    in the simulator. What comes before (waiting for the first images, the first weights) and after it (the rest of the
    reduction, the norm of the gradients, the optimizer) does not count.

    Args:
        figures: [P, replicas, 3]: of each rank busy seconds, first start and last end by one clock.
    """
    busy, start, end = figures.unbind(-1)
    duration = (end.amax(0) - start.amin(0)).sum() * len(figures)
    return float(1 - busy.sum() / duration) if duration > 0 else 0.0


def own_figures(values: Sequence[float], rank: int, size: int) -> list[float]:
    """`values` of this rank among those of `size` ranks, zeros: what is added up over all is everybody's."""
    width = len(values)
    return [0.0] * (width * rank) + list(values) + [0.0] * (width * (size - rank - 1))
