"""Two sweeps: whether layouts have become slower, by more than runs of one program differ among themselves.

Steps of a process are alike, processes are not, so the *run* is what counts: the median of its steps' times over those
of the yardstick beside them, which follow the machine's. Differences are of logarithms. Where the two programs have
taken turns (--against), a round's two runs are compared with each other, step by step if their steps have; else all
runs of a layout with all. bounds.py has the bounds. A layout that ran and now fails is a regression too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from engine.errors import EXIT_DONE, EXIT_FAULT, ConfigError
from tools.benchmark.sweep.bounds import ALL, LEVEL, Bounds, Difference, bounds_of, of_pairs, of_sweeps
from tools.benchmark.sweep.file import failures, runs_of
from tools.benchmark.sweep.report import name_of
from tools.benchmark.table import Row, show

TOLERANCE, TOLERANCE_OF_TURNS = 0.03, 0.01
"""What sweeps at different times, and runs that take turns, may differ in beside noise (docs/performance.md)."""

_NAMES = {"wall": ("step_seconds", "yardstick_seconds"), "cpu": ("step_cpu_seconds", "yardstick_cpu_seconds")}


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: float | None = None, clock: str = "wall") -> int:
    """Print how each layout that both have has changed; returns exit code 1 if one has become slower, or now fails.

    Args:
        tolerance: share by which it may become slower; None: TOLERANCE, or TOLERANCE_OF_TURNS. clock: wall,
            or cpu, whose seconds other programs of the machine disturb less, but which waiting does not add to.

    Raises:
        ConfigError: there is nothing to compare.
    """
    sides = [runs_of(lines) for lines in (old, new)]
    paired = bool(old and new) and (pair := old[0]["sweep"]["pair"]) is not None and pair == new[0]["sweep"]["pair"]
    tolerance = (TOLERANCE_OF_TURNS if paired else TOLERANCE) if tolerance is None else tolerance
    for line in told(old, new):
        print(line)
    differences = {
        name: found
        for name, old_runs in sides[0].items()
        if (found := _difference(old_runs, sides[1].get(name, []), clock, paired=paired)) is not None
    }
    lost = _lost(old, new)
    if not differences and not lost:
        raise ConfigError(
            "the sweeps have no layout in common that both have run twice: give --rounds 2 or more, and the same "
            "configuration"
        )
    slower = _show(differences, sides, tolerance) if differences else []
    for row in lost:
        print(f"failed in the new sweep: {name_of(row)}: {row['why']}")
    failed = f"; failed: {', '.join(map(name_of, lost))}" if lost else ""
    print(f"slower: {', '.join(slower) or 'none'}{failed} ({_in_words(tolerance, clock, paired=paired)})")
    return EXIT_FAULT if slower or lost else EXIT_DONE


def _in_words(tolerance: float, clock: str, *, paired: bool) -> str:
    """What a verdict means."""
    noise = f"false alarms in {LEVEL:.0%} of sweeps at most"
    if paired:
        return f"by more than {tolerance:.3g} of the {clock} time, by turns; {noise}"
    return (
        f"by more than {tolerance:.3g} of the {clock} time, at different times; {noise} as long as the machine has not "
        "changed by more in between, which no two sweeps show: --against tells a program from its machine"
    )


def _show(differences: Mapping[str, Difference], sides: Sequence[Mapping[str, list[Row]]], share: float) -> list[str]:
    """Print the table; returns what is slower."""
    bounds = bounds_of(differences)
    rows = [
        _row(name_of(sides[1][name][0]), [side[name] for side in sides], bounds[name], share) for name in differences
    ]
    rows.sort(key=lambda row: -row["time_new_over_old"])
    rows += [_row(ALL, [[], []], bounds[ALL], share)] if ALL in bounds else []
    show(rows)
    return [row["layout"] for row in rows if row["verdict"] == "slower"]


def _lost(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Of layouts that ran in the old sweep and fail in the new one, if only now and then, the line that says why. None
    of those that failed now and then in both.
    """
    ran, runs = runs_of(old), runs_of(new)
    failed = {line["config_hash"] for line in failures(old)}
    lost = {line["config_hash"]: line for line in failures(new)}
    return [line for name, line in lost.items() if name in ran and not (name in runs and name in failed)]


def value_of(run: Row, clock: str) -> float:
    """Logarithm of a run's time per step over that of the yardstick: the median over its steps, each with the two times
    of the yardstick beside it.
    """
    steps, yards = (run[name] for name in _NAMES[clock])
    around = [(before + after) / 2 for before, after in pairwise(yards)]
    return math.log(statistics.median(step / yard for step, yard in zip(steps, around, strict=True)))


def _difference(old: Sequence[Row], new: Sequence[Row], clock: str, *, paired: bool) -> Difference | None:
    by_round = [{run["round"]: run for run in runs} for runs in (old, new)]
    if not paired:
        return of_sweeps(*({i: value_of(run, clock) for i, run in runs.items()} for runs in by_round))
    rounds = [i for i in by_round[0] if i in by_round[1]]
    return of_pairs({i: _pair(by_round[0][i], by_round[1][i], clock) for i in rounds})


def _pair(old: Row, new: Row, clock: str) -> float:
    """Difference of two runs of a round; where their steps have taken turns, the median of those of neighbours."""
    steps = _NAMES[clock][0]
    if {old["turns"], new["turns"]} != {"steps"} or len(old[steps]) != len(new[steps]):
        return value_of(new, clock) - value_of(old, clock)
    return statistics.median(math.log(b / a) for a, b in zip(old[steps], new[steps], strict=True))


def _row(name: str, runs: Sequence[Sequence[Row]], bounds: Bounds, tolerance: float) -> Row:
    slower, faster = bounds.low > 1 + tolerance, bounds.high < 1 / (1 + tolerance)
    old, new = (statistics.median(run["images_per_second"] for run in side) if side else None for side in runs)
    return {
        "layout": name,
        "old_images_per_second": old,
        "new_images_per_second": new,
        "time_new_over_old": bounds.ratio,
        "from": bounds.low,
        "to": bounds.high,
        "runs": " + ".join(str(len(side)) for side in runs if side),
        "verdict": "slower" if slower else "faster" if faster else "-",
    }


def told(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """What else than time differs between two sweeps, a line each."""
    lines = []
    for key in ("commit", "code", "torch", "machine", "steps", "warmup"):
        values = [{str(line["sweep"][key]) for line in side} for side in (old, new)]
        if values[0] != values[1]:
            lines.append(_differing(key, values))
    ours = [[line["environment"] for line in side if line["status"] == "done"] for side in (old, new)]
    for key in sorted({key for side in ours for one in side for key in one} - _UNLIKE) if all(ours) else []:
        values = [{str(one.get(key)) for one in side} for side in ours]
        if values[0] != values[1]:
            lines.append(_differing(key, values))
    for side, other, words in ((old, new, ("old", "new")), (new, old, ("new", "old"))):
        runs, others = runs_of(side), runs_of(other)
        lines += [
            f"only in the {words[0]} sweep: {name_of(of[0])}{_why(of[0], other, words[1]) or _unlike(of[0], others)}"
            for name, of in runs.items()
            if name not in others
        ]
    return lines


_UNLIKE = {"code", "torch", "load_average_at_start", "threads"}  # told above, or free to differ, or by layout


def _differing(key: str, values: Sequence[set[str]]) -> str:
    return f"{key}: {', '.join(sorted(values[0]))} -> {', '.join(sorted(values[1]))}"


def _why(run: Row, others: Sequence[Row], word: str) -> str:
    """Why the other sweep has not run it, if it tells."""
    said = [
        line
        for line in others
        if line["status"] != "done" and (line["config_hash"] == run["config_hash"] or line["entry"] == run["entry"])
    ]
    return f"; {said[-1]['status']} in the {word} one: {said[-1]['why']}" if said else ""


def _unlike(run: Row, others: Mapping[str, Sequence[Row]]) -> str:
    """Keys in which the same entry of the other sweep differs."""
    same = next((runs[0] for runs in others.values() if runs[0]["entry"] == run["entry"]), None)
    if same is None:
        return ""
    mine: dict[str, Any] = {**run["config"], "ranks": run["ranks"], "threads": run["threads"]}
    its: dict[str, Any] = {**same["config"], "ranks": same["ranks"], "threads": same["threads"]}
    keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
    return ", whose " + ", ".join(f"{key} is {mine.get(key)}, not {its.get(key)}" for key in keys) if keys else ""
