"""Two sweeps: whether layouts have become slower, by more than runs of one program differ among themselves.

Steps of a process are alike, processes are not, so the *run* is what counts: the median of its steps' times over those
of the yardstick beside them, which follow the machine's. Differences are of logarithms. Where the two programs have
taken turns (--against), a round's two runs are compared with each other, step by step if their steps have; else all
runs of a layout with all. Student's t gives the bounds, from a variance that is half the layout's own and half
that of all layouts (as in limma, Smyth 2004, with the weights fixed), and a level that is shared out over the layouts
(Bonferroni): of sweeps of one program at most LEVEL should report a regression. The mean over all layouts has bounds
too: what slows every step shows there long before it does in one layout.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engine.errors import EXIT_DONE, EXIT_FAULT, ConfigError
from tools.benchmark.sweep.report import name_of
from tools.benchmark.table import Row, show

LEVEL = 0.05
TOLERANCE, TOLERANCE_OF_TURNS = 0.02, 0.01
"""What sweeps at different times, and runs that take turns, differ in beside noise (docs/performance.md)."""

ALL = "all together"

_NAMES = {"wall": ("step_seconds", "yardstick_seconds"), "cpu": ("step_cpu_seconds", "yardstick_cpu_seconds")}

Values = dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a layout: the mean difference of logarithms of times, new less old, and how much such means differ.

    Attributes:
        squares: sum of squared deviations. freedom: how many of them are free. weight: variance of the mean over that
            of one value.
    """

    mean: float
    squares: float
    freedom: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Time of the new program over that of the old: the estimate, and where it may lie."""

    ratio: float
    low: float
    high: float


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: float | None = None, clock: str = "wall") -> int:
    """Print how each layout that both have has changed; returns exit code 1 if one has become slower.

    Args:
        tolerance: share by which it may; None: TOLERANCE, or TOLERANCE_OF_TURNS. clock: wall,
            or cpu, whose seconds other programs of the machine disturb less, but which waiting does not add to.

    Raises:
        ConfigError: there is nothing to compare.
    """
    sides = [_runs(lines) for lines in (old, new)]
    paired = bool(old and new) and (pair := old[0]["sweep"]["pair"]) is not None and pair == new[0]["sweep"]["pair"]
    tolerance = (TOLERANCE_OF_TURNS if paired else TOLERANCE) if tolerance is None else tolerance
    for line in told(old, new):
        print(line)
    differences = {
        name: found
        for name, old_runs in sides[0].items()
        if (found := _difference(old_runs, sides[1].get(name, []), clock, paired=paired)) is not None
    }
    if not differences:
        raise ConfigError(
            "the sweeps have no layout in common that both have run twice: give --rounds 2 or more, and the same "
            "configuration"
        )
    bounds = bounds_of(differences)
    rows = [
        _row(name_of(sides[1][name][0]), [side[name] for side in sides], bounds[name], tolerance)
        for name in differences
    ]
    rows.sort(key=lambda row: -row["time_new_over_old"])
    together = [_row(ALL, [[], []], bounds[ALL], tolerance)] if ALL in bounds else []
    show([*rows, *together])
    slower = [row["layout"] for row in [*rows, *together] if row["verdict"] == "slower"]
    means = f"{'by turns' if paired else 'at different times'}, {clock} time, tolerance {tolerance:g}"
    print(f"slower: {', '.join(slower) or 'none'} ({means}; false alarms in {LEVEL:.0%} of sweeps)")
    return EXIT_FAULT if slower else EXIT_DONE


def _runs(lines: Sequence[Row]) -> dict[str, list[Row]]:
    runs: dict[str, list[Row]] = {}
    for line in lines:
        if line["status"] == "done":
            runs.setdefault(line["config_hash"], []).append(line)
    return runs


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
    return of_pairs([_pair(by_round[0][i], by_round[1][i], clock) for i in rounds])


def _pair(old: Row, new: Row, clock: str) -> float:
    """Difference of two runs of a round; where their steps have taken turns, the median of those of neighbours."""
    if {old["turns"], new["turns"]} != {"steps"}:
        return value_of(new, clock) - value_of(old, clock)
    steps = _NAMES[clock][0]
    return statistics.median(math.log(b / a) for a, b in zip(old[steps], new[steps], strict=True))


def of_pairs(pairs: Sequence[float]) -> Difference | None:
    """Of differences in a round each; None of fewer than two."""
    if len(pairs) < 2:
        return None
    mean = statistics.fmean(pairs)
    squares = sum((value - mean) ** 2 for value in pairs)
    return Difference(mean=mean, squares=squares, freedom=len(pairs) - 1, weight=1 / len(pairs))


def of_sweeps(old: Values, new: Values) -> Difference | None:
    """Of all runs of each side; None of fewer than two."""
    if min(len(old), len(new)) < 2:
        return None
    before, after = statistics.fmean(old.values()), statistics.fmean(new.values())
    squares = sum((value - before) ** 2 for value in old.values()) + sum((v - after) ** 2 for v in new.values())
    weight = 1 / len(old) + 1 / len(new)
    return Difference(mean=after - before, squares=squares, freedom=len(old) + len(new) - 2, weight=weight)


def bounds_of(differences: Mapping[str, Difference]) -> dict[str, Bounds]:
    """For each layout, and for ALL of several, at a level that holds for all of these together on each side."""
    from scipy.stats import t  # takes a second

    total = sum(one.freedom for one in differences.values())
    common = sum(one.squares for one in differences.values()) / total
    count = len(differences)

    def bounds(mean: float, variance: float, freedom: int) -> Bounds:
        half = float(t.ppf(1 - LEVEL / (count + (count > 1)), freedom)) * math.sqrt(variance)
        return Bounds(ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))

    found = {}
    for name, one in differences.items():
        variance = (one.squares + one.freedom * common) / (2 * one.freedom)
        found[name] = bounds(one.mean, variance * one.weight, min(2 * one.freedom, total))
    if count > 1:
        mean = statistics.fmean(one.mean for one in differences.values())
        found[ALL] = bounds(mean, common * sum(one.weight for one in differences.values()) / count**2, total)
    return found


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
    for key in sorted({key for side in ours for one in side for key in one} - _UNLIKE):
        values = [{str(one.get(key)) for one in side} for side in ours]
        if values[0] != values[1]:
            lines.append(_differing(key, values))
    sides = [_runs(side) for side in (old, new)]
    for side, other, word in ((sides[0], sides[1], "old"), (sides[1], sides[0], "new")):
        lines += [
            f"only in the {word} sweep: {name_of(runs[0])}{_unlike(runs[0], other)}"
            for name, runs in side.items()
            if name not in other
        ]
    return lines


_UNLIKE = {"code", "torch", "load_average_at_start", "threads"}  # told above, or free to differ, or by layout


def _differing(key: str, values: Sequence[set[str]]) -> str:
    return f"{key}: {', '.join(sorted(values[0]))} -> {', '.join(sorted(values[1]))}"


def _unlike(run: Row, others: Mapping[str, Sequence[Row]]) -> str:
    """Keys in which the same entry of the other sweep differs."""
    same = next((runs[0] for runs in others.values() if runs[0]["entry"] == run["entry"]), None)
    if same is None:
        return ""
    mine: dict[str, Any] = {**run["config"], "ranks": run["ranks"], "threads": run["threads"]}
    its: dict[str, Any] = {**same["config"], "ranks": same["ranks"], "threads": same["threads"]}
    keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
    return ", whose " + ", ".join(f"{key} is {mine.get(key)}, not {its.get(key)}" for key in keys) if keys else ""
