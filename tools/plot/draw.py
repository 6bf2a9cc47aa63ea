"""Runs as one figure: a panel for each kind of number, a colour for each run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tools.figures import COLORS, FAINT, new_figure
from tools.plot.panels import MARKS, PANELS, Axis, Trace, Traced
from tools.plot.read import Numbers

_WIDTH, _HEIGHT = 4.0, 2.6  # of a panel, in inches
_DOTS = 40  # values of a curve up to which each has a dot
_STYLES: dict[str, Literal["-", "--", ":"]] = {
    "training": "-",
    "evaluation": "--",
    "evaluation of the averaged weights": ":",
}
_MARKERS = {"saved": "|", "skipped step": "|", "not finite": "x"}
_HEIGHTS = {"saved": 0.02, "skipped step": 0.97, "not finite": 0.9}  # of marks, as shares of the axes
_TIMES = ((2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one colour stands for: a run, or several whose mean is drawn, with a band from the least to the greatest."""

    name: str
    runs: Sequence[Traced]


def panels_of(shown: Sequence[Shown], asked: Sequence[str] | None) -> list[str]:
    """Those that are asked for and have numbers, or those that have something to tell, in the order of PANELS."""
    curves = [(name, curve) for group in shown for run in group.runs for (name, _), curve in run.curves.items()]
    found = {name for name, curve in curves if asked is not None or curve.tells}
    return [name for name in (PANELS if asked is None else asked) if name in found]


def draw(shown: Sequence[Shown], panels: Sequence[str], axis: Axis, *, title: str, logarithmic: bool = False) -> Figure:
    """The figure. To be called in `tools.figures.style()`, as is what saves it."""
    across = _across(len(panels))
    rows = math.ceil(len(panels) / across)
    figure = new_figure(_WIDTH * across + (3.0 if len(shown) > 1 else 0.0), _HEIGHT * rows + 0.8)
    figure.suptitle(textwrap.shorten(title, 120, placeholder=" …"), x=0.01, horizontalalignment="left")
    grid = figure.subplots(rows, across, squeeze=False).ravel().tolist()
    divisor, label = _unit_of_x(shown, axis)
    colors = _colors(len(shown))
    for axes, name in zip(grid, panels, strict=False):
        for group, color in zip(shown, colors, strict=True):
            _draw_group(axes, name, group, color if len(shown) > 1 else None, divisor)
        _finish(axes, name, logarithmic)
        if len(shown) == 1:
            _summarise(axes, name, shown[0])
    for axes, name in zip(grid, panels, strict=False):
        _mark(axes, name, shown, colors, divisor, everything=name == panels[0])
    left, right = _range_of_x(grid[: len(panels)])
    for i, axes in enumerate(grid):
        if i >= len(panels):
            axes.remove()
            continue
        axes.set_xlim(left, right)
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if axis != "time" else FuncFormatter(_number))
        if i + across >= len(panels):
            axes.set_xlabel(label)
    _explain(figure, shown, colors, grid[: len(panels)], rows)
    return figure


def _across(count: int) -> int:
    """Panels beside each other, so that few places stay empty."""
    return {4: 2, 7: 4, 8: 4}.get(count, min(count, 3))


def _unit_of_x(shown: Sequence[Shown], axis: Axis) -> tuple[float, str]:
    """What x is divided by, and the label."""
    if axis != "time":
        return 1.0, "step" if axis == "steps" else "images"
    end = max(run.end for group in shown for run in group.runs)
    divisor, unit = next((divisor, unit) for least, divisor, unit in _TIMES if end >= least)
    return divisor, f"{unit} of training"


def _colors(count: int) -> list[str]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.93, count))
    return [matplotlib.colors.to_hex(shade) for shade in shades]


def _draw_group(axes: Axes, name: str, group: Shown, color: str | None, divisor: float) -> None:
    """Curves of one colour; without one, each kind of curve has its own."""
    for i, curve in enumerate(PANELS[name].curves):
        traces = [found for run in group.runs if (found := run.curves.get((name, curve.label))) is not None]
        if not traces:
            continue
        own = color or COLORS[list(_STYLES).index(curve.label)]
        style = _STYLES[curve.label] if color and len(PANELS[name].curves) > 1 else "-"
        if len(traces) > 1:
            x, low, mean, high = _over_runs(traces)
            axes.fill_between(x / divisor, low, high, color=own, alpha=0.2, linewidth=0)
            _line(axes, x / divisor, mean, own, style, label=f"{group.name}, {curve.label}", order=3 + i)
            continue
        trace = traces[0]
        if trace.raw is not None:
            axes.plot(trace.raw[0] / divisor, trace.raw[1], color=own, alpha=0.25, linewidth=0.8, label="_raw")
        _line(axes, trace.x / divisor, trace.y, own, style, label=f"{group.name}, {curve.label}", order=3 + i)


def _line(axes: Axes, x: Numbers, y: Numbers, color: str, style: str, *, label: str, order: int) -> None:
    """A curve with gaps at NaN, with dots where values are few, or have no neighbour to draw a line to."""
    known = np.concatenate([[False], np.isfinite(y), [False]])
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    dots = np.flatnonzero(known[1:-1] if len(y) <= _DOTS else alone).tolist()
    axes.plot(x, y, color=color, linestyle=style, marker="o", markersize=2.5, markevery=dots, label=label, zorder=order)


def _over_runs(traces: Sequence[Trace]) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """x that all have, and least, mean and greatest there."""
    low, high = max(t.x[0] for t in traces), min(t.x[-1] for t in traces)
    x = traces[0].x
    x = x[(x >= low) & (x <= high)]
    values = np.stack([np.interp(x, t.x, t.y) for t in traces])
    return x, values.min(axis=0), values.mean(axis=0), values.max(axis=0)


def _finish(axes: Axes, name: str, logarithmic: bool) -> None:
    """Title, unit, scale and ticks that fit the kind of number."""
    axes.set_title(PANELS[name].title)
    axes.set_ylabel(PANELS[name].unit)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=name == "skipped"))
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if name == "speed" else FuncFormatter(_number))
    if PANELS[name].from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
    if name == "loss_scale":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"2^{math.log2(value):g}"))
    elif logarithmic and PANELS[name].can_be_null and axes.dataLim.minposy < axes.dataLim.y1:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_minor_locator(NullLocator())


def _number(value: float, _: object = None) -> str:
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")


def _summarise(axes: Axes, name: str, group: Shown) -> None:
    """The number that says most, at the right of the title."""
    panel = PANELS[name]
    curves = [trace for run in group.runs for (of, _), trace in run.curves.items() if of == name]
    if len(group.runs) > 1:
        return
    value, unit = curves[0].summary, panel.unit.replace("% of the time", "%")
    number = (
        "not finite"
        if math.isnan(value)
        else f"{value:.0f} {unit}"
        if 1e4 <= abs(value) < 1e7
        else f"{value:.4g} {unit}"
    )
    axes.set_title(f"{panel.summary} {number}".strip(), loc="right", size=9, weight="normal", color=FAINT)


def _mark(
    axes: Axes, name: str, shown: Sequence[Shown], colors: Sequence[str], divisor: float, *, everything: bool
) -> None:
    """Where runs were resumed, in all panels; values that are not finite, where they would be; the rest in one."""
    for group, color in zip(shown, colors, strict=True):
        own = color if len(shown) > 1 else FAINT
        for run in group.runs:
            for x in run.marks["resumed"] / divisor:
                axes.axvline(x, color=own, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.7, zorder=1, label="_resumed")
            nulls = [trace.nulls for (of, _), trace in run.curves.items() if of == name]
            marks = {"not finite": np.concatenate([*nulls, np.empty(0)])}
            if everything:
                marks |= {kind: run.marks[kind] for kind in ("saved", "skipped step")}
            for kind, places in marks.items():
                if len(places):
                    axes.plot(
                        places / divisor, np.full(len(places), _HEIGHTS[kind]), transform=axes.get_xaxis_transform(),
                        linestyle="none", marker=_MARKERS[kind], markersize=6 if kind != "not finite" else 4, color=own,
                        markeredgewidth=1.0, label=f"_{kind}",
                    )  # fmt: skip


def _range_of_x(grid: Sequence[Axes]) -> tuple[float, float]:
    limits = [axes.dataLim.intervalx for axes in grid]
    left, right = min(low for low, _ in limits), max(high for _, high in limits)
    margin = (right - left) * 0.02 or 1.0
    return left - margin, right + margin


def _explain(figure: Figure, shown: Sequence[Shown], colors: Sequence[str], grid: Sequence[Axes], rows: int) -> None:
    """The legend: colours at the right where there are several, what lines and marks are below."""
    lines = [line for axes in grid for line in axes.get_lines()]
    labels = [str(line.get_label()) for line in lines]
    kinds = [kind for kind in _STYLES if any(label.endswith(f", {kind}") for label in labels)]
    handles: list[Artist] = []
    texts: list[str] = []
    for kind in kinds if len(kinds) > 1 or len(shown) == 1 else ():
        color = COLORS[list(_STYLES).index(kind)] if len(shown) == 1 else FAINT
        handles.append(Line2D([], [], color=color, linestyle=_STYLES[kind] if len(shown) > 1 else "-"))
        texts.append(kind)
    if any(len(group.runs) > 1 for group in shown):
        handles.append(Patch(color=FAINT, alpha=0.2, linewidth=0))
        texts.append("from least to greatest over seeds")
    if "_raw" in labels:
        handles.append(Line2D([], [], color=FAINT, alpha=0.4, linewidth=0.8))
        texts.append("before smoothing")
    for kind in (kind for kind in MARKS if f"_{kind}" in labels):
        dashed = {"linestyle": (0, (2, 2))} if kind == "resumed" else {"linestyle": "none", "marker": _MARKERS[kind]}
        handles.append(Line2D([], [], color=FAINT, **dashed))
        texts.append(f"{kind} (below)" if kind == "saved" else f"{kind} (above)" if kind == "skipped step" else kind)
    if handles:
        figure.legend(handles, texts, loc="outside lower left", ncols=min(len(handles), 6))
    if len(shown) > 1:
        names = [textwrap.fill(group.name, 44, max_lines=3, placeholder=" …") for group in shown]
        height = sum(name.count("\n") + 1 for name in names) * 0.17
        columns = 1 + int(height / (_HEIGHT * rows + 0.2))
        figure.legend(
            [Line2D([], [], color=color, linewidth=2.5) for color in colors], names,
            loc="outside right upper", ncols=columns, fontsize=9 if columns == 1 else 8,
        )  # fmt: skip
