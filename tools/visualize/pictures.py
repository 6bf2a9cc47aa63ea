"""Overlays of maps on images: one file per image, a sheet of lines and columns where a method has many maps, and a
contact sheet of all images.

Legend: rows x cols of a map, H x W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from engine.seeing.sheet import RANGE, grey_or_rgb, side_of
from model.formats.base import Preprocessing
from tools.convert.images import statistics
from tools.figures import new_figure, save, style
from tools.visualize.shown import Shown

_CONTACT = "contact"  # of the sheet of all images
_ALPHA = 0.62  # of a map over its image
_INCH = 2.2
_SMALL = 1.25
_LETTERS = 28  # of a title's line over a small picture
_LINE = 0.12  # inches that one takes
_ACROSS = 12  # small pictures of a contact sheet
_FINE = 128  # pixels that a map has along the shorter side, at least


@dataclass(frozen=True)
class Scene:
    """An image as it is looked at.

    Attributes:
        name: for the picture. pixels: [H, W, 3] in 0..1. patch: side of one, in pixels.
    """

    name: str
    pixels: np.ndarray[Any, np.dtype[np.float32]]
    patch: int


def names_of(paths: Sequence[Path]) -> list[str]:
    """For their pictures: no two alike, and none that of the contact sheet."""
    stems, names = [path.stem for path in paths], list[str]()
    for i, stem in enumerate(stems):
        name = stem if stems.count(stem) == 1 else f"{stem}-{i}"
        while name in (*names, _CONTACT):
            name = f"{name}-{i}"
        names.append(name)
    return names


def scenes(names: Sequence[str], images: Tensor, how: Preprocessing, patch: int) -> list[Scene]:
    """Of the model's input [B, C, H, W], with its normalisation undone."""
    mean, std = statistics(how, images.shape[1])
    pixels = grey_or_rgb((images * std + mean).clamp(0, 1))
    return [Scene(n, x.permute(1, 2, 0).numpy(), patch) for n, x in zip(names, pixels, strict=True)]


def draw_all(shown: Shown, of: Sequence[Scene], method: str, out: Path) -> list[Path]:
    """Write the pictures of a method; which they are."""
    written = []
    many = len(shown.maps) > 1
    with style():
        for number, scene in enumerate(of):
            path = out / f"{method}-{scene.name}.png"
            save(_sheet(shown, scene, number) if many else _one(shown, scene, number), path, all_colors=True)
            written.append(path)
        written.append(out / f"{method}-{_CONTACT}.png")
        save(_contact(shown, of), written[-1], all_colors=True)
    return written


def _one(shown: Shown, scene: Scene, number: int) -> Figure:
    """The image, its map as the grid is, and smoothed, with a colour bar."""
    fields = shown.maps or shown.colors
    (key,) = fields
    ways = {"pixels" if fields[key].shape[1:3] == scene.pixels.shape[:2] else "patches": False}
    ways |= {"bilinear": True} if shown.smooth else {}
    figure = new_figure((1 + len(ways)) * _INCH + 1, _INCH + 0.5)
    axes = figure.subplots(1, 1 + len(ways))
    _image(axes[0], scene, scene.name)
    bar = None
    for place, (how, smooth) in zip(axes[1:], ways.items(), strict=True):
        bar = _over(place, shown, scene, number, key, smooth) or bar
        place.set_title(f"{' '.join(filter(None, key))}, {how}")
    if bar is not None:
        figure.colorbar(bar, ax=axes[-1], fraction=0.05)
    return figure


def _sheet(shown: Shown, scene: Scene, number: int) -> Figure:
    """All maps of an image, the layers below each other."""
    lines, columns = (list(dict.fromkeys(key[i] for key in shown.maps)) for i in range(2))
    figure = new_figure(_SMALL * (len(columns) + 1) + 0.6, (_SMALL + 0.25) * len(lines) + 0.4)
    axes = figure.subplots(len(lines), len(columns) + 1, squeeze=False)
    for i, line in enumerate(lines):
        _image(axes[i, 0], scene, scene.name if not i else "")
        for j, column in enumerate(columns):
            place = axes[i, j + 1]
            place.set_axis_off()
            if (line, column) in shown.maps:
                _over(place, shown, scene, number, (line, column), smooth=False)
                place.set_title(f"{line}\n{textwrap.fill(column, _LETTERS)}", fontsize=6)
    return figure


def _contact(shown: Shown, of: Sequence[Scene]) -> Figure:
    """Every image, and beside it its last map, or all of them where these are to be compared."""
    keys = list(shown.maps or shown.colors)[0 if shown.compared else -1 :]
    each, several = 1 + len(keys), len(keys) > 1
    across = min(max(1, _ACROSS // each), len(of))
    down = -(-len(of) // across)
    titles = [textwrap.fill(key[1], _LETTERS) if several else "" for key in keys]
    lines = max(title.count("\n") for title in titles)
    figure = new_figure(each * _SMALL * across + 0.2, (_SMALL + 0.2 + _LINE * lines) * down + 0.3)
    axes = figure.subplots(down, each * across, squeeze=False).reshape(-1)
    for place in axes:
        place.set_axis_off()
    for number, scene in enumerate(of):
        first, *others = axes[each * number :][:each]
        _image(first, scene, scene.name)
        for place, key, title in zip(others, keys, titles, strict=True):
            _over(place, shown, scene, number, key, shown.smooth)
            place.set_title(title, fontsize=6)
    figure.suptitle(keys[-1][0] if several else " ".join(filter(None, keys[-1])))
    return figure


def _image(place: Any, scene: Scene, title: str) -> None:
    place.imshow(scene.pixels, interpolation="nearest", extent=_extent(scene))
    place.set_title(title, fontsize=6)
    place.set_axis_off()


def _over(place: Any, shown: Shown, scene: Scene, number: int, key: tuple[str, str], smooth: bool) -> Any:
    """Draw a map over its image; what its colours mean, or None where they are the map."""
    place.set_axis_off()
    place.imshow(scene.pixels, interpolation="nearest", extent=_extent(scene))
    if not shown.maps:
        colors = enlarged(shown.colors[key][number], scene, smooth)
        place.imshow(colors, interpolation="nearest", alpha=0.85, extent=_extent(scene))
        return None
    field = enlarged(shown.maps[key][number][..., None], scene, smooth)[..., 0]
    low, top = _limits(shown.maps[key][number])
    return place.imshow(
        field, cmap="viridis", vmin=low, vmax=top, alpha=_ALPHA, interpolation="nearest", extent=_extent(scene)
    )


def _limits(field: Tensor) -> tuple[float, float]:
    """Between which a map's colours run."""
    low, top = np.quantile(field.numpy(), RANGE)
    return low, top if top > low else low + max(abs(low), 1e-12)


def overlay(scene: Scene, field: Tensor, smooth: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[n H, n W, 3], the map [rows, cols] over its image and nothing else: in a hundredth of the time of a figure."""
    fine = enlarged(field[..., None], scene, smooth)[..., 0]
    low, top = _limits(field)
    colors = matplotlib.colormaps["viridis"](((fine - low) / (top - low)).clip(0, 1))[..., :3]
    times = fine.shape[0] // scene.pixels.shape[0]
    pixels = scene.pixels.repeat(times, 0).repeat(times, 1)
    return np.rint((_ALPHA * colors + (1 - _ALPHA) * pixels) * 255).astype(np.uint8)


def _extent(scene: Scene) -> tuple[float, float, float, float]:
    high, wide = scene.pixels.shape[:2]
    return 0, wide, high, 0


def enlarged(field: Tensor, scene: Scene, smooth: bool) -> np.ndarray[Any, Any]:
    """[rows, cols, F] over the image, [n H, n W, F], n such that smooth maps are smooth on small images, too: each
    patch its square, or between their centres.

    What of patches reaches beyond the image is cut. A map may be of pixels, too.
    """
    (rows, cols), (high, wide) = field.shape[:2], scene.pixels.shape[:2]
    side = side_of((rows, cols), (high, wide), 1 if (rows, cols) == (high, wide) else scene.patch)
    times = -(-_FINE // min(high, wide))
    x = field.permute(2, 0, 1)[None].float()
    size = (rows * side * times, cols * side * times)
    x = F.interpolate(x, size, mode="bilinear") if smooth else F.interpolate(x, size, mode="nearest-exact")
    return x[0, :, : high * times, : wide * times].permute(1, 2, 0).numpy()
