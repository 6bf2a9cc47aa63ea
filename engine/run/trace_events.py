"""What a rank recorded as events of a Chrome trace, which Perfetto and chrome://tracing open.

A process is a rank, its threads are lanes: steps; compute, with waits for messages and phases; messages; collectives.
Times are microseconds. `python -m tools.timeline` reads the categories and arguments that are written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from parallel.pipeline import Action, ActionKind, Interval, Schedule
from parallel.pipeline.boundary import Route
from parallel.pipeline.graph import input_receive
from parallel.pipeline.recording import Slice, StepRecord

Event = dict[str, Any]
STEPS, COMPUTE, MESSAGES, COLLECTIVES = range(4)
_LANES = ("steps", "compute", "messages", "collectives")
_GAP = 2  # nanoseconds: readers round, and drop what overlaps the slice before
_PASSES = 3  # over the schedule, at most, in a step
SIMULATED = 1_000_000  # processes from here on are those of the simulated step


def process_events(process: int, name: str, lanes: Sequence[int]) -> Iterator[Event]:
    """Names of a process and of its lanes, and their order."""
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    for lane in lanes:
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": lane, "args": {"name": _LANES[lane]}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": lane, "args": {"sort_index": lane}}


def step_events(
    record: StepRecord, schedule: Schedule, nbytes: Mapping[Route, int], rank: int, replica: int, shift: int
) -> Iterator[Event]:
    """All that a rank did in a step.

    Args:
        nbytes: of a message of each route.
        replica: which of the pipelines this rank is in: no message goes from one to another.
        shift: nanoseconds that are added to the record's times.
    """
    step, seen = record.step, Counter[Action]()
    if (span := record.span) is None:
        return

    def event(lane: int, category: str, name: str, s: Slice, **arguments: Any) -> Event:
        sized = arguments if s.size is None else arguments | {"bytes": s.size}
        return {
            "ph": "X", "cat": category, "name": name, "pid": rank, "tid": lane, "ts": (s.start + shift) / 1e3,
            "dur": max(0, s.end - s.start - _GAP) / 1e3, "args": {"step": step, **sized},
        }  # fmt: skip

    def mark(phase: str, lane: int, moment: float, name: str, **more: Any) -> Event:
        at = {"pid": rank, "tid": lane, "ts": (moment + shift) / 1e3}
        return {"ph": phase, "cat": "message", "name": name, **at, **more}

    yield event(STEPS, "step", f"step {step}", Slice(None, *span))
    for s in record.computed:
        yield event(COMPUTE, "compute", str(s.what), s, **_arguments(s.what))
        if (receive := input_receive(s.what, schedule)) is not None:
            number = _number(receive.counterpart, schedule, step, replica, seen[receive])
            seen[receive] += 1
            yield mark("f", COMPUTE, s.start + min(1, (s.end - s.start) / 2), "message", id=number, bp="e")
            arguments = {"step": step, **_arguments(receive)}
            yield mark("i", MESSAGES, s.start, f"{receive} is there", s="t", args=arguments)
    for s in record.waits:
        yield event(
            COMPUTE if s.what.kind.is_compute else MESSAGES, "wait", f"wait of {s.what}", s, **_arguments(s.what)
        )
    for s in record.messages:
        route = Route.of(s.what)
        sized = s._replace(size=nbytes.get(route, 0))
        yield event(MESSAGES, "message", str(s.what), sized, carries=str(route), **_arguments(s.what))
        if s.what.kind.is_send:
            number = _number(s.what, schedule, step, replica, seen[s.what])
            seen[s.what] += 1
            yield mark("s", MESSAGES, s.start + min(1, (s.end - s.start) / 2), "message", id=number)
    for s in record.phases:
        yield event(COMPUTE, "phase", str(s.what), s)
    for s in record.calls:
        yield event(COLLECTIVES, "collective", f"{s.what} ({s.axis})", s, axis=s.axis)


def simulated_events(
    ranks: Sequence[Sequence[Interval]], step: int, start: float, unit: float = 1e6, of: int | None = None
) -> Iterator[Event]:
    """A simulated step that begins at `start` (microseconds), in processes of its own.

    Args:
        unit: microseconds per unit of the simulator's time. of: how many micro-batches there are, where forward passes
            over all of them came before (`behind_forwards`), which have them under higher numbers.
    """
    for rank, intervals in enumerate(ranks):
        for i in intervals:
            number = i.action.micro_batch
            action = i.action if of is None or number is None else replace(i.action, micro_batch=number % of)
            yield {
                "ph": "X", "cat": "simulated", "name": str(action), "pid": SIMULATED + rank, "tid": COMPUTE,
                "ts": round(start + unit * i.start, 3),
                "dur": max(0.0, round(unit * (i.end - i.start) - _GAP / 1e3, 3)),
                "args": {"step": step, **_arguments(action)},
            }  # fmt: skip


def _arguments(action: Action) -> dict[str, Any]:
    return {"action": str(action), "stage": action.stage, "micro_batch": action.micro_batch}


def _number(send: Action, schedule: Schedule, step: int, replica: int, turn: int) -> int:
    """Of a message, which no other one of any step or pipeline has: both its ends work it out alike.

    Args:
        turn: how often it went before, in passes of this step.
    """
    assert send.micro_batch is not None
    place = (2 * send.stage + (send.kind is ActionKind.SEND_BACKWARD)) * schedule.num_micro_batches + send.micro_batch
    return (((step << 20) + replica) * _PASSES + turn) * 2 * schedule.num_stages * schedule.num_micro_batches + place
