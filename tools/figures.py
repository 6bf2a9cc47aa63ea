"""How the project's pictures look, and how they get onto the disk.

    with style():
        figure = new_figure(8, 4)
        axes = figure.subplots()
        axes.bar(...)
        save(figure, Path("sweep.png"))

Figures are drawn by Agg into files: no pyplot, no window, and nothing is left changed in the matplotlib of a program
that imports this, whose own matplotlibrc has no say here. It takes half a second to import: name this module late.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from engine.errors import ConfigError
from tools import places

# Okabe and Ito's, told apart by all kinds of colour vision; without yellow, which white paper swallows.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
TEXT, FAINT = "#222222", "#666666"  # what is read first, and what is read if need be

_STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.axisbelow": True,
    "axes.edgecolor": "#aaaaaa",
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.dpi": 100,
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.solid_joinstyle": "round",
    "savefig.dpi": 100,
    "text.color": TEXT,
    "text.parse_math": False,  # a folder may be called cost_$5_$6
    "xtick.color": "#aaaaaa",
    "xtick.labelcolor": FAINT,
    "ytick.color": "#aaaaaa",
    "ytick.labelcolor": FAINT,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """In it figures are made, drawn on and saved; after it matplotlib is as it was."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that gives its axes what room their labels leave; in inches, of which each has 100 pixels."""
    return Figure(figsize=(width, height), layout="constrained")


def check_place(path: Path) -> Path:
    """`path`, if a picture can go there: to be asked before anything is read or drawn.

    Raises:
        ConfigError: it is no .png, or its folder is not there or not to be written to.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: pictures are PNG files: give a name that ends with .png")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK | os.X_OK):  # a picture replaces the earlier one
        raise ConfigError(f"{path} cannot be written: {path.parent} is not yours to write to: name another place")
    return places.check_place(path)


def save(figure: Figure, path: Path, *, all_colors: bool = False) -> None:
    """Write the figure as PNG, whole or not at all: who looks at a picture meanwhile sees the earlier one.

    In 256 colours, which takes a third of the bytes, unless there are photographs on it (`all_colors`). The same figure
    gives the same bytes. Raises ConfigError if the place cannot be written to.
    """
    check_place(path)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks shows as boxes
        canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    fewer = pixels if all_colors else pixels.quantize(256, dither=Image.Dither.NONE)
    with places.written_whole(path) as part:
        fewer.save(part, format="png", optimize=True)
