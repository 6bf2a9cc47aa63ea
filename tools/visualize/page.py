"""One HTML page, with no network, on which a person moves over patches, layers and heads: every row of every map.

page.html beside this file is the page without its contents. They are put in as JSON, and as the rows of each image and
layer, in shades (tools.visualize.shades), compressed; the page unpacks and draws them itself.

Legend: B images, H heads, Q queries, S tokens, P patches.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from engine.errors import ConfigError
from model.config import ModelConfig
from model.seeing.capture import PROBE, Attended, Wanted
from model.seeing.trace import pooled_tokens
from tools.places import written_whole
from tools.visualize.pictures import Scene
from tools.visualize.shades import Rows, coded_bytes, errors, fitted

BYTES = 8_000_000  # of a page
_BESIDE = 500_000  # of them for an image and what all pages have, by which cells are chosen
_TAG = 200  # around the rows of a layer
_SLACK = 2_000
_PNG = 32_000  # bytes; of larger images WebP's eye is good enough
_PALETTES = ("viridis", "cividis", "gray")  # whose lightness alone tells what is more

Capture = Callable[[Tensor, Mapping[str, Wanted]], Mapping[str, Attended] | None]
"""Images [1, C, H, W], what is wanted -> rows; None on ranks that have none to write."""


def cells_of(wanted: Mapping[str, Wanted]) -> int:
    """The side of what the page shows as one, in patches of the first stage, so that an image has room: 1, 2, 4, ..."""
    side, widest = 1, max(max(of.here.rows, of.here.cols) for of in wanted.values())
    while most_bytes(wanted, side) > BYTES - _BESIDE and side < widest:
        side *= 2
    return side


def most_bytes(wanted: Mapping[str, Wanted], side: int) -> int:
    """That rows of one image can take on a page, in the fewest shades."""
    total = 0
    for of in wanted.values():
        cell = _cell(of, wanted, side)
        patches = -(-of.here.rows // cell) * -(-of.here.cols // cell)
        rows = len(of.heads) * (1 if of.name == PROBE else 1 + of.prefix + patches)
        total += base64_bytes(coded_bytes(rows, patches)) + _TAG
    return total


def base64_bytes(count: int) -> int:
    """Of so many bytes."""
    return -(-count // 3) * 4


def _cell(of: Wanted, wanted: Mapping[str, Wanted], side: int) -> int:
    """In patches of the layer's own stage."""
    return max(1, side * min(one.here.stride for one in wanted.values()) // of.here.stride)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is known of a page before there are rows.

    Attributes:
        config: resolved. wanted: of all queries. cells: of each layer, the side of what is shown as one, in its own
            patches. about: what the page is told; its images are those that have room. room: bytes for their rows.
    """

    config: ModelConfig
    wanted: Mapping[str, Wanted]
    cells: Mapping[str, int]
    about: Mapping[str, Any]
    room: int

    @property
    def images(self) -> int:
        """How many it has."""
        return len(self.about["images"])

    @staticmethod
    def of(title: str, config: ModelConfig, wanted: Mapping[str, Wanted], scenes: Sequence[Scene]) -> Page:
        """With as many of the images as have room. Raises ConfigError where not one has."""
        side = cells_of(wanted)
        cells = {name: _cell(of, wanted, side) for name, of in wanted.items()}
        about: dict[str, Any] = {
            "title": title,
            "grid": [config.sizes.stages[0].rows, config.sizes.stages[0].cols],
            "patch": config.sizes.patch,
            "tokens": list(_prefix_names(config)),
            "layers": [_layer(of, cells[name], config) for name, of in wanted.items()],
            "palettes": {name: _palette(name) for name in _PALETTES},
        }
        room = BYTES - len(_template().encode()) - len(html.escape(title)) - len(_json(about)) - _SLACK
        about["images"] = _with_room([_scene(scene) for scene in scenes], room, most_bytes(wanted, side))
        room -= len(_json(about["images"])) + _TAG * len(cells) * len(about["images"])
        return Page(config=config, wanted=wanted, cells=cells, about=about, room=room)


def write_page(path: Path, page: Page, capture: Capture, images: Tensor) -> list[str]:
    """Capture images [B, C, H, W] one by one, as many as the page has, and write it.

    Returns:
        Lines to print; none on ranks that have no rows.

    Raises:
        ConfigError: the file cannot be written.
    """
    rows, layers = list[Rows](), len(page.cells)
    for image in images[: page.images].split(1):
        if (found := capture(image, page.wanted)) is not None:
            rows += [_rows(found[name], page.config, cell) for name, cell in page.cells.items()]
    if not rows:
        return []
    shades, coded = fitted(rows, page.room * 3 // 4)
    mean, worst = errors(rows, shades)
    about = _json({**page.about, "shades": shades, "error": [round(mean, 5), round(worst, 5)]})
    blobs = (
        f'<script type="text/plain" id="rows-{i // layers}-{i % layers}">{base64.b64encode(blob).decode()}</script>'
        for i, blob in enumerate(coded)
    )
    parts = {"TITLE": html.escape(page.about["title"]), "ABOUT": about, "ROWS": "\n".join(blobs)}
    text = re.sub("@(TITLE|ABOUT|ROWS)@", lambda found: parts[found[1]], _template())
    size = len(text.encode())
    assert size <= BYTES, (size, page.images)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
    lines = [
        f"{path}: {size / 1e6:.2f} MB, {page.images} images x {layers} layers; {shades} shades, "
        f"wrong by {mean:.1%} of a map's range on average, 99 % of shares by {worst:.1%} at most"
    ]
    if page.images < len(images):
        lines.append(f"the first {page.images} of {len(images)} images: name fewer --layers or --heads for more")
    if (side := max(page.cells.values())) > 1:
        lines.append(f"cells are of {side} x {side} patches, so that the page is small: name fewer --layers or --heads")
    return lines


def _template() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """To stand in a script of the page."""
    return json.dumps(value).replace("<", "\\u003c")


def _with_room(scenes: Sequence[dict[str, Any]], room: int, each: int) -> list[dict[str, Any]]:
    """The first of the images, whose rows take `each` bytes at most."""
    ends = accumulate(len(_json(scene)) + 2 + each for scene in scenes)
    found = [scene for scene, end in zip(scenes, ends, strict=True) if end <= room]
    if not found:
        raise ConfigError(
            f"a page has {BYTES / 1e6:.0f} MB at most, and the rows of one image take {each / 1e6:.1f} MB in the "
            "fewest shades: name fewer --layers or --heads"
        )
    return found


def _rows(found: Attended, config: ModelConfig, cell: int) -> Rows:
    """Of one image: what is pooled, the prefix tokens, and the patches take of patches."""
    (rows,), of = found.rows, found.wanted
    grid = of.here.rows, of.here.cols
    if of.name != PROBE:
        pooled = torch.einsum("q,hqs->hs", pooled_tokens(config, of.total), rows)[:, None]
        patches = _in_cells(rows[:, of.prefix :].transpose(1, 2), grid, cell, mean=True).transpose(1, 2)
        rows = torch.cat([pooled, rows[:, : of.prefix], patches], 1)
    return Rows.of(_in_cells(rows[..., of.prefix :], grid, cell, mean=False), rows[..., : of.prefix].sum(-1))


def _in_cells(x: Tensor, grid: tuple[int, int], cell: int, *, mean: bool) -> Tensor:
    """[..., P] of a grid -> of cells of cell x cell patches, which are less at its edges; their mean, or sum."""
    if cell == 1:
        return x
    maps = x.reshape(-1, 1, *grid)
    size = F.avg_pool2d(torch.ones(1, 1, *grid), cell, ceil_mode=True, divisor_override=1)
    found = F.avg_pool2d(maps, cell, ceil_mode=True, divisor_override=1) / (size if mean else 1)
    return found.reshape(*x.shape[:-1], -1)


def _prefix_names(config: ModelConfig) -> Iterator[str]:
    sizes = config.sizes
    for kind in ("class_token", "register", "global_token"):
        count = getattr(sizes, f"{kind}s")
        yield from (kind.replace("_", " ") + (f" {i + 1}" if count > 1 else "") for i in range(count))


def _layer(of: Wanted, cell: int, config: ModelConfig) -> dict[str, Any]:
    return {
        "name": of.name,
        "heads": list(of.heads),
        "rows": -(-of.here.rows // cell),
        "cols": -(-of.here.cols // cell),
        "ratio": cell * of.here.stride // config.sizes.stages[0].stride,  # of a cell to a patch of the first stage
        "probe": of.name == PROBE,
    }


def _scene(scene: Scene) -> dict[str, Any]:
    high, wide = scene.pixels.shape[:2]
    image, file, kind = Image.fromarray(np.rint(scene.pixels * 255).astype(np.uint8)), BytesIO(), "png"
    image.save(file, "png", optimize=True)
    if file.tell() > _PNG:
        file, kind = BytesIO(), "webp"
        image.save(file, "webp", quality=90)
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"name": scene.name, "source": source, "rows": high, "cols": wide}


def _palette(name: str) -> str:
    """256 colours, six hexadecimal digits each."""
    import matplotlib

    return (matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]).tobytes().hex()
