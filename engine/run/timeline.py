"""The timeline of the steps of `log.profile_steps`: what each rank writes, and how that becomes one Chrome trace.

Each rank writes its own part, events by one clock; rank 0 reads the parts line by line into `timeline.json`, and adds
the simulated step, with the costs that it finds in them. So no rank ever holds what others have recorded.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from engine.run.trace_events import (
    COLLECTIVES,
    COMPUTE,
    MESSAGES,
    SIMULATED,
    STEPS,
    Event,
    process_events,
    simulated_events,
    step_events,
)
from parallel.grid import GridShape
from parallel.pipeline import Action, ActionKind, Costs, Schedule, ScheduleError, Timeline, behind_forwards, simulate
from parallel.pipeline.boundary import Route
from parallel.pipeline.graph import input_receive
from parallel.pipeline.recording import StepRecord

NAME = "timeline.json"
MOST_RANKS = 128  # of whose steps the timeline has everything: whole pipelines, the first replicas
MOST_SLICES = 200_000  # of all these ranks together, about: 90 MB
_FEWEST = 1_500  # of a rank, where there are many
_BACKWARDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


def part_of(folder: Path, rank: int) -> Path:
    """The file that a rank writes."""
    return folder / f"timeline-rank{rank}.jsonl"


def ranks_shown(shape: GridShape) -> list[int]:
    """The ranks that are in a timeline."""
    replicas = shape.world_size // shape.pipeline
    shown = max(1, MOST_RANKS // shape.pipeline)
    return [rank for rank in range(shape.world_size) if rank % replicas < shown]


def room_of(shape: GridShape) -> int:
    """Slices that a rank keeps."""
    return max(_FEWEST, MOST_SLICES // len(ranks_shown(shape)))


def write_part(
    path: Path,
    records: Sequence[StepRecord],
    header: Mapping[str, Any],
    schedule: Schedule,
    nbytes: Mapping[Route, int],
    shape: GridShape,
    shift: int,
) -> None:
    """A rank's part: one line of JSON that tells of it, then one for each event.

    Args:
        header: has the `rank`. nbytes: of a message of each route.
        shift: nanoseconds to add to the times of the records.
    """
    rank, replicas = header["rank"], shape.world_size // shape.pipeline
    place = ", ".join(f"{name} {index}" for name, index in shape.coordinates(rank).items())
    steps = chain.from_iterable(step_events(r, schedule, nbytes, rank, rank % replicas, shift) for r in records)
    names = process_events(rank, f"rank {rank}: {place}", (STEPS, COMPUTE, MESSAGES, COLLECTIVES))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for line in chain([dict(header)], names, steps):
            file.write(_text(line) + "\n")


def merge(parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the Chrome trace of all parts, of which the first is rank 0's. Returns what it tells of itself.

    Raises:
        OSError: a file cannot be read or written.
    """
    found = _Found()
    partial = out.with_name(f".{out.name}.part")
    try:
        with partial.open("w") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            events = chain(chain.from_iterable(_lines(part, found) for part in parts), map(_text, found.simulated()))
            for number, event in enumerate(events):
                file.write((",\n" if number else "\n") + event)
            summary = found.summary()
            file.write('\n],\n"otherData": ' + _text(summary) + "}\n")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return summary


def _lines(part: Path, found: _Found) -> Iterator[str]:
    with part.open() as file:
        found.header(json.loads(next(file)))
        for line in file:
            found.event(json.loads(line))
            yield line.rstrip("\n")


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@dataclass
class _Found:
    """What is in the parts, as far as the simulated step and the bubbles need it. Times in microseconds."""

    headers: list[dict[str, Any]] = field(default_factory=list)
    busy: dict[tuple[int, int], list[tuple[str, float, float]]] = field(default_factory=lambda: defaultdict(list))
    waits: dict[tuple[int, int, str], float] = field(default_factory=dict)
    sends: dict[tuple[int, int, str], float] = field(default_factory=dict)

    def header(self, header: dict[str, Any]) -> None:
        self.headers.append(header)

    def event(self, event: Event) -> None:
        arguments, rank = event.get("args", {}), event["pid"]
        match event.get("cat"), event["ph"]:
            case "compute", "X":
                self.busy[arguments["step"], rank].append((event["name"], event["ts"], event["ts"] + event["dur"]))
            case "wait", "X" if "action" in arguments:
                self.waits.setdefault((arguments["step"], rank, arguments["action"]), event["ts"])
            case "message", "X":
                self.sends[arguments["step"], rank, arguments["action"]] = event["ts"]

    @property
    def first(self) -> dict[str, Any]:
        """Rank 0's header."""
        return self.headers[0]

    @cached_property
    def schedule(self) -> Schedule:
        told = self.first["schedule"]
        return Schedule.from_text(told["text"], name=told["name"], stage_to_rank=told["stage_to_rank"])

    @property
    def steps(self) -> list[int]:
        """Those that all ranks have recorded."""
        return sorted(set.intersection(*(set(header["steps"]) for header in self.headers)))

    @property
    def undisturbed(self) -> list[int]:
        """Those in which torch's profiler did not run, if there are any."""
        return [step for step in self.steps if step not in self.first["traced"]] or self.steps

    def costs(self) -> Costs:
        """Mean times of the actions, median of messages, in seconds; B counts as I where a stage has no I.

        Of a stage that recomputes (R), backwards that had to do so themselves do not count.
        """
        times: dict[tuple[str, int], list[float]] = defaultdict(list)
        recomputing = {action.stage for action in self.schedule.recomputes}
        for (step, _), actions in self.busy.items():
            ran = [(Action.parse(name), end - start) for name, start, end in actions if step in self.undisturbed]
            done = {(action.stage, action.micro_batch) for action, _ in ran if action.kind is ActionKind.RECOMPUTE}
            for action, took in ran:
                late = action.stage in recomputing and (action.stage, action.micro_batch) not in done
                if action.kind not in _BACKWARDS or not late:
                    times[action.kind.value, action.stage].append(took)

        def mean(*kinds: str) -> tuple[float, ...]:
            stages = range(self.first["schedule"]["num_stages"])
            held = [next((times[k, s] for k in kinds if times.get((k, s))), [0.0]) for s in stages]
            return tuple(statistics.fmean(values) / 1e6 for values in held)

        return Costs(
            forward=mean("F"), backward_input=mean("I", "B"), backward_weight=mean("W"), recompute=mean("R"),
            latency=self._latency() / 1e6,
        )  # fmt: skip

    def _latency(self) -> float:
        """Of a message whose receiver waited for it already; where there is none, of the quickest."""
        schedule, replicas = self.schedule, self.first["replicas"]
        awaited, any_ = [], []
        for (step, rank), actions in self.busy.items():
            for name, start, _ in actions if step in self.undisturbed else ():
                receive = input_receive(Action.parse(name), schedule)
                if receive is None:
                    continue
                sender = schedule.peer(receive) * replicas + rank % replicas
                sent = self.sends.get((step, sender, str(receive.counterpart)))
                if sent is not None and start >= sent:
                    any_.append(start - sent)
                    if self.waits.get((step, rank, name), start) <= sent:
                        awaited.append(start - sent)
        return statistics.median(awaited) if awaited else min(any_, default=0.0)

    def simulated(self) -> Iterator[Event]:
        """The events of the simulated step, once for each recorded one, from where that begins."""
        timeline = self.timeline
        if timeline is None:
            return
        for rank in range(len(timeline.ranks)):
            yield from process_events(SIMULATED + rank, f"simulated rank {rank}", (COMPUTE,))
        free = 0.0  # from where on: a simulated step that takes longer than the measured one pushes the next on
        for step in self.steps:
            start = min(actions[0][1] for (found, _), actions in self.busy.items() if found == step and actions)
            yield from simulated_events(timeline.ranks, step, max(start, free), of=self.schedule.num_micro_batches)
            free = max(start, free) + 1e6 * timeline.makespan

    @cached_property
    def timeline(self) -> Timeline | None:
        """The simulated step."""
        if not self.steps:
            return None
        try:
            whole = behind_forwards(self.schedule, self.first["schedule"]["forward_passes"])
            return simulate(whole, self.costs(), self.first["schedule"]["policy"])
        except ScheduleError:  # a part is missing, and with it a stage
            return None

    def bubble(self, step: int) -> float:
        """Measured, of the pipelines that are here."""
        replicas, pipelines = self.first["replicas"], defaultdict(list)
        for (found, rank), actions in self.busy.items():
            if found == step and actions:
                pipelines[rank % replicas].append(actions)
        busy = total = 0.0
        for ranks in pipelines.values():
            start, end = min(a[0][1] for a in ranks), max(a[-1][2] for a in ranks)
            total += len(ranks) * (end - start)
            busy += sum(e - s for actions in ranks for _, s, e in actions)
        return 1 - busy / total if total else 0.0

    def summary(self) -> dict[str, Any]:
        """For `otherData`."""
        costs, timeline = self.costs(), self.timeline
        return {
            "format": 1,
            "schedule": self.first["schedule"],
            "grid": self.first["grid"],
            "ranks": [header["rank"] for header in self.headers],
            "steps": self.steps,
            "steps_slowed_by_torch_profiler": self.first["traced"],
            "bubble": {str(step): self.bubble(step) for step in self.steps},
            "bubble_simulated": None if timeline is None else timeline.bubble_fraction,
            "seconds": {
                "F": costs.forward, "I": costs.backward_input, "W": costs.backward_weight, "message": costs.latency,
                **({"R": costs.recompute} if self.schedule.recomputes else {}),
            },
            "clock_error_seconds": max(header["clock_error"] for header in self.headers) / 1e9,
            "not_recorded": {str(h["rank"]): h["missing"] for h in self.headers if h["missing"]},
        }  # fmt: skip
