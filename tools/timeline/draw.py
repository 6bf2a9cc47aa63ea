"""Panels as one figure: a lane for each rank, a colour for each kind of box."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tools.figures import COLORS, FAINT, TEXT, new_figure
from tools.timeline.picture import Box, Panel

_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _GREY = COLORS


@dataclass(frozen=True)
class Kind:
    """How boxes of a kind look. is_strip: drawn along the foot of the lane, over what it is part of."""

    color: str
    words: str
    is_strip: bool = False


KINDS = {
    "F": Kind(_BLUE, "F: forward"),
    "B": Kind(_ORANGE, "B: whole backward"),
    "I": Kind(_RED, "I: gradient of the inputs"),
    "W": Kind(_GREEN, "W: gradient of the weights"),
    "R": Kind(_SKY, "R: recompute of what was dropped"),
    "wait": Kind("#dddddd", "waits for a message"),
    "message": Kind("#b3a2c7", "sends, posts receives"),
    "reduction": Kind("#888888", "finishes gradients"),
    "norm": Kind("#bbbbbb", "loss and norm: all meet"),
    "optimizer": Kind(_PINK, "optimizer"),
    "collective": Kind(TEXT, "waits in a collective", is_strip=True),
    "reading": Kind("#f0e442", "reads images", is_strip=True),
}
_LEAST_WIDTH, _MOST_WIDTH, _MOST_HEIGHT = 11.0, 24.0, 32.0  # inches, of 100 pixels
_BOX_PIXELS = 15  # that the usual box should have: what is too long for the width goes on below
_ROW, _LEAST_ROW, _MOST_ROWS = 0.3, 0.1, 16.0  # inches: of a lane, of one among many, of all lanes of a panel
_PER_DIGIT, _FONT = 5.0, 7  # pixels of a digit, points


def draw(panels: Sequence[Panel], *, title: str, unit: str) -> Figure:
    """The figure. To be called in `tools.figures.style()`, as is what saves it."""
    end = max(panel.end for panel in panels) or 1.0
    margin = 0.6 + 0.068 * max(len(name) for panel in panels for name in panel.lanes)
    wanted = _BOX_PIXELS / 100 * end / (_usual(panels) or end)  # inches of time
    rows = [max(_LEAST_ROW, min(_ROW, _MOST_ROWS / len(panel.lanes))) for panel in panels]
    heights = [row * len(panel.lanes) + 0.55 for row, panel in zip(rows, panels, strict=True)]
    spans = math.ceil(wanted / (_MOST_WIDTH - margin))
    if spans * sum(heights) > _MOST_HEIGHT:
        spans = 1
    width = min(_MOST_WIDTH, max(_LEAST_WIDTH, margin + wanted / spans))
    figure = new_figure(width, spans * sum(heights) + 0.95)
    figure.suptitle(textwrap.shorten(title, int(13 * width), placeholder=" …"), x=0.01, horizontalalignment="left")
    ratios = [height for height in heights for _ in range(spans)]
    grid = iter(figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios).ravel().tolist())
    pixels = 100 * (width - margin) / (end / spans)
    for panel, row in zip(panels, rows, strict=True):
        for span in range(spans):
            axes = next(grid)
            if span == 0:
                axes.set_title(panel.title)
                axes.set_title(panel.note, loc="right", size=9, weight="normal", color=FAINT)
            _draw_panel(axes, panel, (span * end / spans, (span + 1) * end / spans), pixels, row)
    axes.set_xlabel(unit)
    _explain(figure, panels, int(width / 2))
    return figure


def _explain(figure: Figure, panels: Sequence[Panel], columns: int) -> None:
    """The legend."""
    boxes = [box for panel in panels for boxes in panel.lanes.values() for box in boxes]
    used = {box.kind for box in boxes}
    handles = [Patch(color=kind.color, label=kind.words) for name, kind in KINDS.items() if name in used]
    if any(box.shade for box in boxes):
        handles.append(Patch(facecolor=_paler(_BLUE, 1), label="paler: a later stage of the rank"))
    figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), columns))


def _usual(panels: Sequence[Panel]) -> float:
    """The width of a short box among those with a label."""
    widths = sorted(b.end - b.start for panel in panels for boxes in panel.lanes.values() for b in boxes if b.label)
    return widths[len(widths) // 4] if widths else 0.0


def _draw_panel(axes: Axes, panel: Panel, limits: tuple[float, float], pixels: float, row: float) -> None:
    """Args: limits: in time. pixels: of a unit of time. row: inches of a lane."""
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlim(*limits)
    axes.set_ylim(len(panel.lanes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    every = max(1, round(0.13 / row))
    axes.set_yticks(range(0, len(panel.lanes), every), [name for i, name in enumerate(panel.lanes) if i % every == 0])
    half = 0.44 if row > 0.15 else 0.5
    labelled = _labelled(panel, pixels) if row > 0.12 else set()
    for lane, everything in enumerate(panel.lanes.values()):
        boxes = [box for box in everything if box.start < limits[1] and box.end > limits[0]]
        ranges: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        for box in boxes:
            ranges[box.kind, box.shade].append((box.start, box.end - box.start))
        for (name, shade), spans in ranges.items():
            kind = KINDS[name]
            place = (lane + half - 0.16, 0.16) if kind.is_strip else (lane - half, 2 * half)
            edges = 0.0 if kind.is_strip or min(s for _, s in spans) * pixels < 4 else 0.6
            axes.broken_barh(
                spans, place, facecolors=_paler(kind.color, shade), edgecolor="white", linewidth=edges,
                zorder=3 if kind.is_strip else 2,
            )  # fmt: skip
        for box in boxes:
            if box.kind in labelled and _fits(box, pixels):
                _label(axes, box, lane)


def _labelled(panel: Panel, pixels: float) -> set[str]:
    """Kinds of boxes a quarter of which has room for its labels: a few labels among many boxes say nothing."""
    fits: dict[str, list[bool]] = defaultdict(list)
    for boxes in panel.lanes.values():
        for box in boxes:
            if box.label:
                fits[box.kind].append(_fits(box, pixels))
    return {kind for kind, found in fits.items() if 4 * sum(found) > len(found)}


def _fits(box: Box, pixels: float) -> bool:
    return bool(box.label) and (box.end - box.start) * pixels >= _PER_DIGIT * len(box.label) + 2


def _label(axes: Axes, box: Box, lane: int) -> None:
    color = _paler(KINDS[box.kind].color, box.shade)
    bright = sum(weight * part for weight, part in zip((0.3, 0.59, 0.11), to_rgb(color), strict=True))
    axes.text(
        (box.start + box.end) / 2, lane, box.label, size=_FONT, color=TEXT if bright > 0.5 else "white",
        horizontalalignment="center", verticalalignment="center", clip_on=True, zorder=4,
    )  # fmt: skip


def _paler(color: str, shade: int) -> str:
    """Of a later stage of a rank: each goes half of the way to white that the one before has left, but for a rest."""
    share = 0.85 * (1 - 0.5**shade)
    red, green, blue = (part + (1 - part) * share for part in to_rgb(color))
    return to_hex((red, green, blue))
