"""The timeline of a run (profile/timeline.json, or the parts of its ranks) as panels."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.run.timeline import NAME, merge, part_of
from engine.run.trace_events import COMPUTE, SIMULATED
from parallel.pipeline import Action
from tools.timeline.picture import Box, Panel, lane_names, shades

_PHASES = {  # by how they begin
    "finishing gradients": "reduction",
    "adding up loss and norm": "norm",
    "optimizer": "optimizer",
    "waiting": "wait",
    "sending": "message",
    "reading": "reading",
}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Steps of a run.

    Attributes:
        events: of the trace. told: of itself (`otherData`).
    """

    events: list[dict[str, Any]]
    told: dict[str, Any]


def source_of(run: Path) -> Path:
    """What is to be read: a timeline, such as that of a run directory, or the folder where parts of one are.

    Raises:
        ConfigError: there is none.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ConfigError(f"{run} is no run: give the run_dir of one, or its profile/{NAME}")
    for folder in (run / "profile", run):
        if (folder / NAME).is_file():
            return folder / NAME
        if any(folder.glob("timeline-rank*.jsonl")):
            return folder
    raise ConfigError(
        f"{run} has no profile/{NAME}: no step of it was recorded; train with --log.profile_steps FIRST,LAST"
    )


def read(source: Path) -> Recorded:
    """The timeline that `source_of` found. Raises ConfigError if it cannot be read, or is something else."""
    try:
        if source.is_file():
            return _parsed(source)
        first = part_of(source, 0)
        others = [part for part in sorted(source.glob("timeline-rank*.jsonl")) if part != first]
        if not first.is_file():
            raise ConfigError(f"{source} lacks {first.name}, which tells the schedule: put all parts there")
        with tempfile.TemporaryDirectory() as scratch:
            merge([first, *others], Path(scratch) / NAME)
            return _parsed(Path(scratch) / NAME)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{source} is no timeline of a run ({error}): give the run_dir of a run that recorded steps by "
            f"log.profile_steps, or its profile/{NAME}"
        ) from error


def _parsed(path: Path) -> Recorded:
    content = _json(path)
    told, events = content.get("otherData"), content["traceEvents"]
    if not isinstance(told, dict) or "schedule" not in told:
        by = "torch's profiler" if {"schemaVersion", "deviceProperties"} & content.keys() else "--trace or others"
        raise ValueError(f"it is a trace by {by}, which tells of no schedule")
    if told["format"] != 1:
        raise ValueError(f"its format is {told['format']}")
    return Recorded(events=[e for e in events if e["ph"] == "X"], told=told)


def _json(path: Path) -> dict[str, Any]:
    """Of a trace. Raises ValueError where it is none."""
    if path.suffix == ".jsonl":
        raise ValueError("it is the part of one rank: give the folder, where all parts are")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"it is no JSON, or cut off: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise ValueError("it is JSON, but no trace")
    return content


def choose_step(recorded: Recorded, wanted: int | None) -> int:
    """The step to draw: by default the last that torch's profiler did not slow. Raises ConfigError if it is missing."""
    steps, slowed = recorded.told["steps"], recorded.told["steps_slowed_by_torch_profiler"]
    if not steps:
        raise ConfigError("no step was recorded on all ranks")
    if wanted is None:
        return max((step for step in steps if step not in slowed), default=max(steps))
    if wanted not in steps:
        raise ConfigError(f"--step {wanted} was not recorded: there are {_numbers(steps)}")
    return wanted


def panels_of(recorded: Recorded, step: int, rank: int) -> list[Panel]:
    """The step as measured, on the pipeline that `rank` is in, and as simulated; in milliseconds from its first action.

    Raises:
        ConfigError: that pipeline was not recorded.
    """
    told = recorded.told
    replicas = _replicas(told)
    size = told["grid"]["pipeline"]
    pipeline = [stage * replicas + rank % replicas for stage in range(size)]
    if not set(pipeline) <= set(told["ranks"]):
        raise ConfigError(
            f"--rank {rank} is in a pipeline that was not recorded whole: there are ranks {_numbers(told['ranks'])}"
        )
    events = [e for e in recorded.events if e["args"].get("step") == step]
    start = min(e["ts"] for e in events if e["pid"] in pipeline and e["cat"] == "compute")
    placement = told["schedule"]["stage_to_rank"]
    shade = shades(placement)
    measured = {p: _boxes([e for e in events if e["pid"] == p], start, shade) for p in pipeline}
    origin = min((e["ts"] for e in events if e["cat"] == "simulated"), default=0.0)
    simulated = {p: _boxes([e for e in events if e["pid"] == SIMULATED + p], origin, shade) for p in range(size)}
    names = lane_names(placement, [f"rank {p}" for p in pipeline])
    computed = [e for e in events if e["pid"] in pipeline and e["cat"] == "compute"]
    span = max(e["ts"] + e["dur"] for e in computed) - start
    bubble = 1 - sum(e["dur"] for e in computed) / (span * size)
    others = f"; bubble of all pipelines {100 * told['bubble'][str(step)]:.1f} %" if replicas > 1 else ""
    slowed = " (slowed by torch's profiler)" if step in told["steps_slowed_by_torch_profiler"] else ""
    panels = [
        Panel(
            title=f"measured: bubble {100 * bubble:.1f} %",
            note=f"{span / 1e3:.4g} ms of forward and backward{others}{slowed}",
            lanes={name: measured[p] for name, p in zip(names, pipeline, strict=True)},
        )
    ]
    if any(simulated.values()):
        end = max(box.end for boxes in simulated.values() for box in boxes)
        panels.append(
            Panel(
                title=f"simulated with the mean times: bubble {100 * told['bubble_simulated']:.1f} %",
                note=f"{end:.4g} ms; a message {1e3 * told['seconds']['message']:.3g} ms",
                lanes={name: simulated[p] for p, name in enumerate(names)},
            )
        )
    return panels


def _replicas(told: dict[str, Any]) -> int:
    grid = told["grid"]
    return int(grid["data"] * grid["context"] * grid["tensor"])


def _boxes(events: list[dict[str, Any]], start: float, shade: list[int]) -> list[Box]:
    """Args: start: the moment that is 0."""
    boxes = []
    for e in events:
        at = (e["ts"] - start) / 1e3, (e["ts"] + e["dur"] - start) / 1e3
        match e["cat"]:
            case "compute" | "simulated":
                action = Action.parse(e["name"])
                boxes.append(Box(action.kind.value, *at, str(action.micro_batch), shade[action.stage]))
            case "wait" if e["tid"] == COMPUTE:
                boxes.append(Box("wait", *at))
            case "message":
                boxes.append(Box("message", *at))
            case "phase":
                kinds = [kind for start, kind in _PHASES.items() if e["name"].startswith(start)]
                boxes += [Box(kind, *at) for kind in kinds]
            case "collective" if e["name"].startswith("wait "):
                boxes.append(Box("collective", *at))
    return boxes


def _numbers(values: list[int]) -> str:
    """`2 to 4`, or `2, 4, 7`."""
    ordered = sorted(values)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
