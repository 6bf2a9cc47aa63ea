"""What a sweep shows: a table of its layouts, fastest first, and a picture of the same."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tools.benchmark.table import Row, show


def report(lines: Sequence[Row], picture: Path | None) -> None:
    """Print the table, and what was not measured with the reasons; draw `picture` if it is given."""
    rows = rows_of(lines)
    print()
    if rows:
        show(rows)
    for line in _not_measured(lines):
        print(f"{line['status']}: {name_of(line)}: {line['why']}")
    if rows and picture is not None:
        draw(rows, picture)
        print(f"sweep: the picture is {picture}")


def name_of(line: Row) -> str:
    """The grid's entry in words."""
    return " ".join(f"{name}={value}" for name, value in line["entry"].items())


def _not_measured(lines: Sequence[Row]) -> list[Row]:
    last = {(line["status"], name_of(line)): line for line in lines if line["status"] != "done"}
    done = {name_of(line) for line in lines if line["status"] == "done"}
    return [line for (status, name), line in last.items() if status == "failed" or name not in done]


def rows_of(lines: Sequence[Row]) -> list[Row]:
    """A row per layout, fastest first: medians over its runs; quartiles are of the steps of all of them."""
    runs: dict[str, list[Row]] = {}
    for line in lines:
        if line["status"] == "done":
            runs.setdefault(line["config_hash"], []).append(line)
    return sorted(map(_row, runs.values()), key=lambda row: -row["images_per_second"])


def _row(runs: Sequence[Row]) -> Row:
    first = runs[0]
    steps = [seconds for run in runs for seconds in run["step_seconds"]]
    low, _, high = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3

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


def draw(rows: Sequence[Row], picture: Path) -> None:
    """Bars of images per second, with whiskers at the quartiles of steps, and of memory beside them."""
    from tools.figures import COLORS, new_figure, save, style  # takes half a second

    names = [f"{row['layout']}  ({row['grid_p_d_c_t']})" for row in rows]
    rates = [row["images_per_second"] for row in rows]
    whiskers = [
        [max(0.0, rate - row["lower_quartile"]) for rate, row in zip(rates, rows, strict=True)],
        [max(0.0, row["upper_quartile"] - rate) for rate, row in zip(rates, rows, strict=True)],
    ]
    memory = [row["peak_memory_MiB_per_rank"] for row in rows]
    with style():
        figure = new_figure(10, 1.2 + 0.32 * len(rows))
        speed, size = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        speed.barh(names, rates, xerr=whiskers, color=COLORS[0], height=0.7, ecolor=COLORS[6], capsize=2)
        size.barh(names, memory, color=COLORS[1], height=0.7)
        for axes, title, values in (
            (speed, "images/s, quartiles of steps", rates),
            (size, "peak memory, MiB per rank", memory),
        ):
            axes.set_title(title)
            axes.set_xlim(0, 1.15 * max([*values, *(row["upper_quartile"] for row in rows if axes is speed)]))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        speed.invert_yaxis()  # the fastest on top
        for number, (row, most) in enumerate(zip(rows, memory, strict=True)):
            at = max(row["upper_quartile"], row["images_per_second"])
            speed.annotate(
                f"{row['images_per_second']:.4g}", (at, number), (4, 0), textcoords="offset points", va="center"
            )
            size.annotate(f"{most:.0f}", (most, number), (4, 0), textcoords="offset points", va="center")
        save(figure, picture)
