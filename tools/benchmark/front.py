"""Time over memory: which ways are dominated by others, and the picture of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Point:
    """A way to train.

    Attributes:
        seconds: of its steps, one per round. memory: MiB, by what is counted.
    """

    name: str
    is_ours: bool
    seconds: tuple[float, ...]
    memory: Mapping[str, float]

    def time_over(self, other: Point) -> float:
        """The median of ratios within a round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def verdicts(points: Sequence[Point], measure: str) -> dict[str, str | None]:
    """Of each point of theirs, the fastest of ours that takes no more memory, if it takes no more time; else None."""
    ours = [point for point in points if point.is_ours]
    found = dict[str, str | None]()
    for point in (point for point in points if not point.is_ours):
        fits = [one for one in ours if one.memory[measure] <= point.memory[measure]]
        best = min(fits, key=lambda one: one.time_over(point), default=None)
        found[point.name] = best.name if best is not None and best.time_over(point) <= 1 else None
    return found


def at_every_budget(points: Sequence[Point], measure: str) -> str:
    """In words: whether at each memory that a way of theirs takes, the fastest of ours within it beats the fastest of
    theirs within it, and by how much.
    """
    of: dict[bool, list[Point]] = {side: [point for point in points if point.is_ours == side] for side in (True, False)}
    ratios = dict[float, float]()
    for budget in sorted(point.memory[measure] for point in of[False]):
        ours, theirs = ([p for p in of[side] if p.memory[measure] <= budget] for side in (True, False))
        times = [min((one.time_over(other) for one in ours), default=float("inf")) for other in theirs]
        ratios[budget] = max(times)
    lost = [f"{budget:.0f} MiB" for budget, ratio in ratios.items() if ratio > 1]
    most, least = max(ratios.values()), min(ratios.values())
    return (
        f"ours is the faster at {len(ratios) - len(lost)} of the {len(ratios)} budgets that theirs takes, in "
        f"{least:.2f} to {most:.2f} of the time" + (f"; not at {', '.join(lost)}" if lost else "")
    )


def draw(points: Sequence[Point], picture: Path, title: str) -> None:
    """Both measures of memory side by side, every point with its name; linear axes that begin where points do."""
    from tools import figures  # takes half a second

    with figures.style():
        figure = figures.new_figure(13, 6)
        figure.suptitle(title)
        panels = figure.subplots(1, len(points[0].memory), squeeze=False)[0]
        for axes, measure in zip(panels, points[0].memory, strict=True):
            _panel(axes, points, measure)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        figure.draw_without_rendering()  # labels are placed where the points have come to lie
        for axes, measure in zip(panels, points[0].memory, strict=True):
            _label(axes, points, measure)
        figures.save(figure, picture)


def _panel(axes: Any, points: Sequence[Point], measure: str) -> None:
    from tools import figures

    for is_ours, name, marker in ((True, "Vitruvius", "o"), (False, "torch.utils.checkpoint", "s")):
        chosen = sorted(
            (point.memory[measure], statistics.median(point.seconds)) for point in points if point.is_ours == is_ours
        )
        if chosen:
            axes.plot(*zip(*_lower(chosen), strict=True), color=figures.COLORS[not is_ours], alpha=0.5)
            axes.scatter(*zip(*chosen, strict=True), color=figures.COLORS[not is_ours], marker=marker, s=22, label=name)
    axes.set(title=measure.replace("_", " "), xlabel="MiB", ylabel="seconds per step")
    axes.margins(0.15)


def _lower(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other undercuts in both."""
    return [(m, t) for m, t in points if not any(n <= m and s < t for n, s in points)]


def _label(axes: Any, points: Sequence[Point], measure: str) -> None:
    """A name beside each point, at the first of some places where nothing else is."""
    from matplotlib.transforms import Bbox

    taken = [
        Bbox.from_bounds(x - 4, y - 4, 8, 8)
        for x, y in axes.transData.transform([_place(point, measure) for point in points])
    ]
    for point in points:
        for dx, dy in ((6, 6), (6, -14), (-6, 6), (-6, -14), (0, 14), (0, -24), (6, 20), (6, -28), (-6, 20), (-6, -28)):
            text = axes.annotate(
                point.name, _place(point, measure), (dx, dy), textcoords="offset pixels", fontsize=8,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
            )  # fmt: skip
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(point.name, _place(point, measure), (6, 6), textcoords="offset pixels", fontsize=8)
            box = text.get_window_extent()
        taken.append(box)


def _place(point: Point, measure: str) -> tuple[float, float]:
    return point.memory[measure], statistics.median(point.seconds)
