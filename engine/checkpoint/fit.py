"""What of a checkpoint's weights fits a model of another geometry, depth or head, tensor by tensor.

Names and shapes alone decide, but for positions and the patch kernel, whose shapes say too little (4 x 4 patches have
as many positions as 2 x 8): there image and patch sizes of both models do. What an image tower calls `image.blocks.3` a
model that stands alone calls `blocks.3`.

Legend: D width, C channels, P patch side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from model.resize import block_of_relative, can_resize_channels, resize_channels, resize_relative, resize_weights
from model.sizes import class_rows, class_tokens_of
from model.towers import IMAGE
from parallel.checkpoint.manifest import shapes_apart
from parallel.sharding.boxes import Box

Shape = tuple[int, ...]
How = Literal["taken", "resized", "new", "left out"]
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What positions, patches and the blocks' numbers depend on.

    Attributes:
        grid: rows and columns of patches. class_rows: of embed.pos, those of class tokens. depths: blocks of each
            stage. windows: rows and columns of a window, of each stage.
    """

    grid: tuple[int, int]
    patch: int
    channels: int
    position: str
    class_tokens: int
    class_rows: int
    depths: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]

    @staticmethod
    def of(model: Mapping[str, Any]) -> Geometry:
        """Of the resolved group `model` of a configuration, as nested keys. Raises KeyError if one is missing that
        every checkpoint has."""
        side, patch, stages = model["image_size"], model["patch_size"], model["stages"]
        rows, cols = (side, side) if isinstance(side, int) else side
        tokens = model.get("class_tokens", class_tokens_of(model["pool"]))
        grid = (-(-rows // patch), -(-cols // patch))
        return Geometry(
            grid=grid,
            patch=patch,
            channels=model["in_channels"],
            position=model["position"],
            class_tokens=tokens,
            class_rows=class_rows(model["position"], tokens, model.get("class_position", True)),
            depths=tuple(stage["depth"] for stage in stages) if stages else (model["depth"],),
            windows=tuple(_windows(grid, [(of["window_size"], of.get("merge", True)) for of in stages or [model]])),
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(stage, place in it) of each block, in order of their numbers."""
        return ((stage, i) for stage, depth in enumerate(self.depths) for i in range(depth))


def _windows(grid: tuple[int, int], stages: Iterable[tuple[int, bool]]) -> Iterator[tuple[int, int]]:
    """No larger than the map. Args: stages: the side of a window, and whether the map is half of that before."""
    rows, cols = grid
    for number, (side, merges) in enumerate(stages):
        if number and merges:
            rows, cols = -(-rows // 2), -(-cols // 2)
        yield min(side, rows), min(side, cols)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A logical tensor of a model that starts from a checkpoint, or one of the checkpoint that it has no use for.

    Attributes:
        name: in the model; of what is left out, in the checkpoint. here, stored: shapes, None where there is none.
        source: its name in the checkpoint, if it is there. how: what becomes of it. note: what was done beside.
    """

    name: str
    here: Shape | None
    stored: Shape | None
    source: str | None
    how: How
    note: str = ""

    def describe(self) -> str:
        """For a message about checkpoints of another model."""
        return shapes_apart(self.name, self.stored, self.here)


def fit(here: Mapping[str, Shape], stored: Mapping[str, Shape], source: Geometry, target: Geometry) -> tuple[Fit, ...]:
    """What becomes of each tensor: those of the model in its order, then those that are left out.

    Blocks correspond by their place in their stage of a pyramid, all else by name.

    Args:
        here, stored: shapes of the model's and the checkpoint's tensors. source, target: geometries of the two.
    """
    numbers = {place: number for number, place in enumerate(source.blocks())}
    renamed = {number: numbers.get(place) for number, place in enumerate(target.blocks())}
    named = {_lone(name): name for name in stored}
    fits = []
    for name, shape in here.items():
        own = _lone(name)
        origin = named.get(own)
        if block := _BLOCK.fullmatch(own):
            number = renamed[int(block[1])]
            origin = None if number is None else named.get(f"blocks.{number}.{block[2]}")
        if origin is None:
            fits.append(Fit(name=name, here=shape, stored=None, source=None, how="new"))
            continue
        how, note = _how(own, shape, stored[origin], source, target)
        if own.startswith("head.fc.") and _is_another_head(name, origin, stored):
            how = "new"
        fits.append(Fit(name=name, here=shape, stored=stored[origin], source=origin, how=how, note=note))
    used = {f.source for f in fits}
    left = (name for name in stored if name not in used)
    return (*fits, *(Fit(name=n, here=None, stored=stored[n], source=n, how="left out") for n in left))


def _is_another_head(name: str, origin: str, stored: Mapping[str, Shape]) -> bool:
    """Whether one is a classifier and the other the projection of an image tower, of whatever shape.

    A model that stands alone here has a classifier. One there has, with a bias, a classifier, too; without, what other
    libraries have for a projection.
    """
    return name != origin and (name == _lone(name) or f"{origin.rpartition('.')[0]}.bias" in stored)


def _lone(name: str) -> str:
    """What a tensor is called where the image tower stands alone."""
    return name.removeprefix(f"{IMAGE}.")


def _how(name: str, here: Shape, stored: Shape, source: Geometry, target: Geometry) -> tuple[How, str]:
    if (number := block_of_relative(name)) is not None:
        return _of_relative(here, stored, *_window_of(number, source, target))
    expected, wanted = _embedding_shape(name, here, source), _embedding_shape(name, here, target)
    if expected is None:
        return ("taken" if here == stored else "new"), ""
    if stored != expected or here != wanted:
        return "new", ""
    if name == "embed.weight":
        if not can_resize_channels(source.channels, target.channels):
            return "new", ""
        changed, same = source.channels != target.channels, source.patch == target.patch
        how = "summed over" if target.channels == 1 else "repeated over"
        note = f"{how} channels, {source.channels} to {target.channels}" if changed else ""
        return ("taken" if same and not changed else "resized"), note
    if name == "embed.cls":
        return _of_class_tokens(source.class_tokens, target.class_tokens, "")
    if name != "embed.pos" or source.class_rows == target.class_rows:
        return ("taken" if source.grid == target.grid else "resized"), ""
    return _of_class_tokens(source.class_rows, target.class_rows, "'s")


def _window_of(number: int, source: Geometry, target: Geometry) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a block of the model, and of its like in the checkpoint: there, here."""
    stage, _ = list(target.blocks())[number]
    return source.windows[stage], target.windows[stage]


def _of_relative(here: Shape, stored: Shape, before: tuple[int, int], now: tuple[int, int]) -> tuple[How, str]:
    shapes = [(here[0], (2 * high - 1) * (2 * wide - 1)) for high, wide in (now, before)]
    if [here, stored] != shapes:
        return "new", ""
    return ("taken" if before == now else "resized"), ""


def _of_class_tokens(before: int, now: int, what: str) -> tuple[How, str]:
    """What becomes of a tensor with so many rows of class tokens, the first the class token's itself."""
    if before == now:
        return "taken", ""
    which = "the distillation token" if before and now else "the class token" if before + now == 1 else "class tokens"
    return "resized", f"{which}{what} is new" if now > before else f"without {which}{what}"


def _embedding_shape(name: str, here: Shape, geometry: Geometry) -> Shape | None:
    """Of a tensor that can be resized, with the width that it has here; None for any other."""
    rows, cols = geometry.grid
    lengths = {
        "embed.pos_row": rows, "embed.pos_col": cols, "embed.pos": geometry.class_rows + rows * cols,
        "embed.cls": geometry.class_tokens,
    }  # fmt: skip
    if name == "embed.weight":
        return (here[0], geometry.channels * geometry.patch**2)
    return (lengths[name], here[-1]) if name in lengths else None


def resized(name: str, values: Tensor, source: Geometry, target: Geometry) -> list[tuple[Box, Tensor]]:
    """A tensor that is `resized`: what it becomes, and which boxes of the model's tensor that is.

    Args:
        values: the whole tensor of the checkpoint.
    """
    name = _lone(name)
    if (number := block_of_relative(name)) is not None:
        return [_rows(0, resize_relative(values, *_window_of(number, source, target)))]
    if name == "embed.cls":
        return [_rows(0, values[: min(source.class_tokens, target.class_tokens)])]
    kept = values[: min(source.class_rows, target.class_rows)]
    if name == "embed.weight":
        values = resize_channels(values, source.channels, target.channels)
    elif name == "embed.pos":
        values = values[source.class_rows :]
    out = resize_weights(
        {name: values},
        position=target.position,
        source_grid=source.grid,
        target_grid=target.grid,
        channels=target.channels,
        source_patch=source.patch,
        target_patch=target.patch,
        class_rows=0,
    )[name]
    if name != "embed.pos":
        return [_rows(0, out)]
    return [_rows(0, kept)] * (len(kept) > 0) + [_rows(target.class_rows, out)]


def _rows(first: int, values: Tensor) -> tuple[Box, Tensor]:
    """Rows of a tensor from the `first` on."""
    return Box((first, 0), tuple(values.shape)), values


def is_another_model(fits: Sequence[Fit]) -> bool:
    """Whether no matrix of any block is taken: the rest is of no use without."""
    return not any(f.how == "taken" and "blocks." in f.name and len(f.here or ()) > 1 for f in fits)
