"""What a sweep shows: a table of its layouts, fastest first, and a picture of the same."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from tools.benchmark.sweep.file import failures, runs_of
from tools.benchmark.sweep.grid import in_words
from tools.benchmark.table import Row, show
from tools.benchmark.timing import quartiles

_LONGEST = 80  # letters of a name in the table and the picture


def report(lines: Sequence[Row], picture: Path | None) -> None:
    """Print the table, and what was not measured with the reasons; draw `picture` if it is given."""
    rows, missing = rows_of(lines), _not_measured(lines)
    measured = [row["layout"] for row in rows]
    failed = [name for line in missing if line["status"] == "failed" and (name := name_of(line)) not in measured]
    labels = _labels([*measured, *failed])
    print()
    if rows:
        show([{**row, "layout": label} for row, label in zip(rows, labels, strict=False)])
    for name, label in zip(measured, labels, strict=False):
        if len(name) > _LONGEST:
            print(f"{label.partition(' ')[0]} is {name}")
    for line in missing:
        print(f"{line['status']}: {name_of(line)}: {line['why']}")
    if rows and picture is not None:
        draw(rows, labels, picture)
        print(f"sweep: the picture is {picture}")


def name_of(line: Row) -> str:
    """The grid's entry as it would be written there."""
    return in_words(line["entry"])


def _not_measured(lines: Sequence[Row]) -> list[Row]:
    """The last line of each layout that was skipped, or has failed in a round and has not been made since."""
    last = {name_of(line): line for line in [*(one for one in lines if one["status"] == "skipped"), *failures(lines)]}
    return list(last.values())


def rows_of(lines: Sequence[Row]) -> list[Row]:
    """A row per layout, fastest first: medians over its runs; quartiles are of the steps of all of them."""
    return sorted(map(_row, runs_of(lines).values()), key=lambda row: -row["images_per_second"])


def _row(runs: Sequence[Row]) -> Row:
    first = runs[0]
    steps = [seconds for run in runs for seconds in run["step_seconds"]]
    low, high = quartiles(steps)

    def median(name: str) -> float | None:
        values = [run[name] for run in runs if run[name] is not None]
        return statistics.median(values) if values else None

    return {
        "layout": name_of(first),
        "grid_p_d_c_t": first["grid_p_d_c_t"],
        "ranks": first["ranks"],
        "threads": first["environment"]["threads"],
        "images_per_second": median("images_per_second"),
        "lower_quartile": first["global_batch"] / high,
        "upper_quartile": first["global_batch"] / low,
        "runs": len(runs),
        "steps": len(steps),
        "tflops_per_device": median("tflops_per_device"),
        "mfu": median("mfu"),
        "mfu_of_measured_gemm": median("mfu_of_measured_gemm"),
        "peak_memory_MiB_per_rank": max(run["peak_memory_MiB_per_rank"] for run in runs),
        "communication_share": median("communication_share"),
    }


def draw(rows: Sequence[Row], labels: Sequence[str], picture: Path) -> None:
    """Bars of images per second, with whiskers at the quartiles of steps, and of memory beside them. Labels beyond the
    rows are of what has failed, and has no bars.
    """
    from tools.figures import COLORS, FAINT, new_figure, save, style  # takes half a second

    shapes = [f"  ({row['grid_p_d_c_t']})" for row in rows]
    names = [label + shape for label, shape in zip_longest(labels, shapes, fillvalue="")]
    at = range(len(rows))
    rates = [row["images_per_second"] for row in rows]
    whiskers = [
        [max(0.0, rate - row["lower_quartile"]) for rate, row in zip(rates, rows, strict=True)],
        [max(0.0, row["upper_quartile"] - rate) for rate, row in zip(rates, rows, strict=True)],
    ]
    memory = [row["peak_memory_MiB_per_rank"] for row in rows]
    ends = [max(row["upper_quartile"], row["images_per_second"]) for row in rows]
    with style():
        figure = new_figure(max(10, 6 + 0.07 * max(map(len, names))), 1.2 + 0.32 * len(names))
        speed, size = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        speed.barh(at, rates, xerr=whiskers, color=COLORS[0], height=0.7, ecolor=COLORS[6], capsize=2)
        size.barh(at, memory, color=COLORS[1], height=0.7)
        for axes, title, most in (
            (speed, "images/s, quartiles of steps", max(ends)),
            (size, "peak memory, MiB per rank", max(memory)),
        ):
            axes.set_title(title)
            axes.set_xlim(0, 1.15 * (most or 1))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        speed.set_yticks(range(len(names)), names)
        speed.set_ylim(len(names) - 0.5, -0.5)  # the fastest on top
        texts = [
            *((speed, end, number, f"{rate:.4g}") for number, (end, rate) in enumerate(zip(ends, rates, strict=True))),
            *((size, most, number, f"{most:.0f}") for number, most in enumerate(memory)),
        ]
        for axes, x, y, text in texts:
            axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center")
        for y in range(len(rows), len(names)):
            speed.annotate("failed", (0, y), (4, 0), textcoords="offset points", va="center", color=FAINT)
        save(figure, picture)


def _labels(names: Sequence[str]) -> list[str]:
    """Names that are too long are cut in the middle; all have numbers then, since what is left may be the same."""
    if all(len(name) <= _LONGEST for name in names):
        return list(names)
    half = _LONGEST // 2
    short = [
        name if len(name) <= _LONGEST else f"{name[:half]} \N{HORIZONTAL ELLIPSIS} {name[-half:]}" for name in names
    ]
    return [f"{number}. {name}" for number, name in enumerate(short, 1)]
