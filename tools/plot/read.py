"""metrics.jsonl (docs/runs.md) as columns of numbers. NaN stands for null, and for what is missing."""

from __future__ import annotations

import json
import stat
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError

Numbers = NDArray[np.float64]
Table = Mapping[str, Numbers]

FILE = "metrics.jsonl"
RECALLS = ("image_to_text", "text_to_image", "view_1_to_view_2", "view_2_to_view_1")  # of objective contrastive
COLUMNS = {  # what is read of the lines of each event; other events and fields are passed over
    "train": (
        "step", "wall_time", "samples", "step_time", "loss", "lr", "grad_norm", "loss_scale", "skipped_steps",
        "images_per_second", "mfu", "peak_memory", "data_time", "bubble",
    ),
    "eval": (
        "step", "wall_time", "eval_time",
        *(f"{of}{name}" for of in ("", "ema_") for name in ("loss", "accuracy", "zero_shot_accuracy")),
        *(f"{of}recall_{way}@1" for of in ("", "ema_") for way in RECALLS),
    ),
    "bad_step": ("step", "wall_time"),
    "save": ("step", "wall_time", "saved_step", "blocked_time"),
}  # fmt: skip
_LONGEST_LINE = 1 << 20  # zeros that a power cut left may go on for gigabytes
_LEAST_GAP, _GAP_SHARE = 2.0, 0.05  # seconds, and of the time that lines account for: no run starts again in less


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run has written so far.

    Attributes:
        folder: its run directory. tables: the columns of each event, in the order of steps.
        began: wall time of the start of its first step.
        resumed: the last step before each place where the run stood still: it was started again there.
        still: (wall time at which the run went on, seconds that it had stood still by then), of those places.
        damaged: numbers of lines that nobody can read, between others that are sound.
    """

    folder: Path
    tables: Mapping[str, Table]
    began: float
    resumed: Numbers
    still: tuple[Numbers, Numbers]
    damaged: tuple[int, ...]


def locate(run: Path) -> Path:
    """The metrics of a run directory, or of the file itself. Raises ConfigError, with what to do, if there are none."""
    try:
        if stat.S_ISREG(run.stat().st_mode):
            return run
    except OSError as error:
        raise ConfigError(f"{run} cannot be read: {error.strerror}") from error
    if not run.is_dir():
        raise ConfigError(f"{run} is neither a run directory nor its {FILE}")
    if (path := run / FILE).is_file():
        return path
    raise ConfigError(f"{run} has no {FILE}, which a run begins at its first step: {_cure(run)}")


def _cure(folder: Path) -> str:
    """Where the metrics may be instead."""
    for above in list(folder.absolute().parents)[:2]:
        if (above / FILE).is_file():
            return f"give its run directory, {above}"
    try:
        inside = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    except OSError:
        inside = []
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"give a run directory in it: {', '.join(map(str, inside[:3]))}{more}"
    if any(folder.glob("step-*")) or any(folder.glob("checkpoints/step-*")):
        return "it has checkpoints alone, and a picture needs the metrics too"
    return "give the run_dir of a run"


def read_run(path: Path, first: int = 0, last: int | None = None) -> Run:
    """What is in the file at `path`, from step `first` to `last`; the half line of a run that is writing is left out.

    Raises:
        ConfigError: it cannot be read, is no metrics.jsonl, or has no training line.
    """
    damaged: list[int] = []
    try:
        with path.open("rb") as stream:
            raw = _columns(path, _lines(path, iter(lambda: stream.readline(_LONGEST_LINE), b""), damaged))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    tables = {event: {name: np.frombuffer(column) for name, column in table.items()} for event, table in raw.items()}
    if not len(tables["train"]["step"]):
        raise ConfigError(f"{path} has no training line yet: a run writes one every log.interval steps; wait for it")
    resumed, still = _standstills(tables)
    wall, step_time, step = (tables["train"][name][0] for name in ("wall_time", "step_time", "step"))
    began = float(wall - np.nan_to_num(step_time) * step)
    tables = {event: _between(table, first, last) for event, table in tables.items()}
    if not len(tables["train"]["step"]):
        whole = raw["train"]["step"]
        raise ConfigError(
            f"{path} has no training line from step {first} to {'the end' if last is None else last}: "
            f"its lines are of steps {whole[0]:.0f} to {whole[-1]:.0f}"
        )
    steps = tables["train"]["step"]
    resumed = resumed[(resumed >= steps[0]) & (resumed <= steps[-1])]
    return Run(folder=path.parent, tables=tables, began=began, resumed=resumed, still=still, damaged=tuple(damaged))


def _lines(path: Path, lines: Iterator[bytes], damaged: list[int]) -> Iterator[tuple[int, dict[str, object]]]:
    """Number and content of each line that is an event. Of others the numbers go to `damaged`."""
    sound = False
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and type(values.get("step")) is int and isinstance(values.get("event"), str):
            sound = True
            yield number, values
        elif line.endswith(b"\n") or len(line) == _LONGEST_LINE:
            if not sound:
                raise ConfigError(
                    f"{path}, line {number}: no JSON object with event and step: it is no {FILE} of a run"
                )
            damaged.append(number)


def _columns(path: Path, lines: Iterator[tuple[int, dict[str, object]]]) -> dict[str, dict[str, array[float]]]:
    """Of each event. Where steps go back, as in files that were put together, later lines count."""
    tables = {event: {name: array("d") for name in names} for event, names in COLUMNS.items()}
    writers = {event: [(name, column.append) for name, column in table.items()] for event, table in tables.items()}
    nan, reached = float("nan"), -1
    for number, values in lines:
        event = values["event"]
        if event == "train":
            if (step := values["step"]) <= reached:  # type: ignore[operator]
                _cut(tables, step)  # type: ignore[arg-type]
            reached = step  # type: ignore[assignment]
        for name, append in writers.get(event, ()):  # type: ignore[call-overload]
            value = values.get(name)
            try:
                append(nan if value is None else value)
            except (TypeError, OverflowError):
                shown = str(value)[:40]
                raise ConfigError(f"{path}, line {number}: {name} is {shown!r}: it must be a number or null") from None
    return tables


def _cut(tables: Mapping[str, Mapping[str, array[float]]], step: int) -> None:
    """Leave out what is of `step` and later."""
    for table in tables.values():
        keep = sum(found < step for found in table["step"])
        for column in table.values():
            del column[keep:]


def _between(table: Table, first: int, last: int | None) -> dict[str, Numbers]:
    steps = table["step"]
    wanted = (steps >= first) & (steps <= (np.inf if last is None else last))
    return {name: column if wanted.all() else column[wanted] for name, column in table.items()}


def _standstills(tables: Mapping[str, Table]) -> tuple[Numbers, tuple[Numbers, Numbers]]:
    """(steps, (wall times, seconds so far)) of where more time passed between two lines than training, evaluation and
    saving account for: the run was not running. Files that go on tell it in no other way.
    """
    train, nothing = tables["train"], np.empty(0)
    wall = train["wall_time"]
    events = [table for table in tables.values() if len(table["step"])]
    clock, step = (np.concatenate([table[name] for table in events]) for name in ("wall_time", "step"))
    if len(wall) < 2 or not np.isfinite(clock).all():
        return nothing, (nothing, nothing)
    known = train["step_time"][1:] * np.diff(train["step"])
    for event, name in (("eval", "eval_time"), ("save", "blocked_time")):
        which = np.searchsorted(wall, tables[event]["wall_time"]) - 1
        inside = (which >= 0) & (which < len(known)) & np.isfinite(tables[event][name])
        np.add.at(known, which[inside], tables[event][name][inside])
    lost = np.diff(wall) - known
    places = np.flatnonzero(lost > np.maximum(_LEAST_GAP, _GAP_SHARE * known))
    order = np.argsort(clock, kind="stable")
    clock, step = clock[order], step[order]
    before, after = np.searchsorted(clock, wall[places], "left"), np.searchsorted(clock, wall[places + 1], "left")
    longest = [b + int(np.argmax(np.diff(clock[b : a + 1]))) for b, a in zip(before, after, strict=True)]
    return step[longest], (clock[np.asarray(longest, dtype=int) + 1], np.cumsum(lost[places]))
