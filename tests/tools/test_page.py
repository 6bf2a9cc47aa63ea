"""The page of all maps, in a real browser: what it draws is what the model attends to, by pointer and by keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from model import ModelConfig, VisionTransformer
from model.config import StageConfig
from model.seeing.capture import choose
from model.seeing.trace import pooled_tokens
from tests.model.small import TINY
from tests.tools.browser import Browser
from tools.visualize import page, shades
from tools.visualize.page import Page, write_page
from tools.visualize.pictures import Scene

CLASSED = replace(TINY, pool="cls", registers=1, in_channels=3, image_size=(8, 10))
PYRAMID = ModelConfig(
    image_size=(22, 24), patch_size=2, in_channels=3, num_classes=5, pool="map", attention="window", window_size=3,
    stages=(StageConfig(depth=1, width=16, num_heads=2), StageConfig(depth=2, width=32, num_heads=4)),
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def models() -> dict[str, VisionTransformer]:
    torch.manual_seed(0)
    found = {name: VisionTransformer(config).eval() for name, config in (("classed", CLASSED), ("pyramid", PYRAMID))}
    for model in found.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return found


MODELS = models()


def images_for(model: VisionTransformer, count: int = 2) -> Tensor:
    return torch.rand(count, model.sizes.channels, *model.sizes.image, generator=torch.Generator().manual_seed(1))


def written(model: VisionTransformer, path: Path, **asked: Any) -> list[str]:
    images, wanted = images_for(model), choose(model.config, **asked)
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    scenes = [Scene(f"image <!--<script>{i}", x, model.sizes.patch) for i, x in enumerate(pixels)]
    planned = Page.of("a & b </script>", model.config, wanted, scenes)
    return write_page(path, planned, lambda image, _: model.capture(image, **asked), images)


def expected(model: VisionTransformer, image: int, name: str) -> Tensor:
    """[H, Q, P] as the page has them: first what is pooled."""
    found = model.capture(images_for(model), layers=[name])[name]
    rows = found.rows[image]
    if name != "head":
        rows = torch.cat(
            [torch.einsum("q,hqs->hs", pooled_tokens(model.config, rows.shape[-1]), rows)[:, None], rows], 1
        )
    return rows[..., found.wanted.prefix :]


@pytest.mark.parametrize(("shade", "way"), [(256, 0), (24, 1), (12, 2), (5, 2), (3, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_the_page_unpacks_what_was_captured(
    name: str, shade: int, way: int, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shades, "SHADES", (shade,))
    monkeypatch.setattr(shades, "DIFFERENCES", {way: shades.DIFFERENCES[way]})
    written(model := MODELS[name], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.value("showImage(1)")
    for number, layer in enumerate(choose(model.config)):
        shares = browser.value(
            f"(() => {{ const f = store[1][{number}]; return Array.from(f.codes, (c, i) => "
            "f.least[i / f.patches | 0] + f.range[i / f.patches | 0] * square[c]); })()"
        )
        right = expected(model, 1, layer)
        least, height = right.amin(-1, keepdim=True), (right.amax(-1) - right.amin(-1))[..., None]
        wrong = (torch.tensor(shares).view(right.shape) - right).abs()
        allowed = height * (1.02 / (shade - 1) + 0.01) + 0.003 * least  # half a step, and of two numbers' logarithms
        assert (wrong <= allowed).all(), (layer, (wrong - allowed).max())
    assert not browser.errors


def test_keys_and_pointer(browser: Browser, tmp_path: Path) -> None:
    model = MODELS["classed"]
    written(model, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.until("store[0].every(Boolean)")
    browser.frame()

    def says(image: int, layer: int, head: int | None, token: int) -> None:
        """That it tells, and draws, the map of this token, 0 what is pooled, and its strongest patch."""
        rows = expected(model, image, f"blocks.{layer}")[:, token]
        row = rows.mean(0) if head is None else rows[head]
        best = int(row.argmax())
        said = browser.value("byId('said').textContent")
        head_name = "mean of heads" if head is None else f"head {head}"
        assert said.startswith(f"blocks.{layer}, {head_name}: "), said
        found = re.search(
            r"takes most of the patch of row (\d+), column (\d+): (\S+) %. \S+ % goes to class token, register", said
        )
        assert found is not None and (int(found[1]), int(found[2])) == divmod(best, 5), said
        assert float(found[3]) == pytest.approx(100 * float(row[best]), rel=0.01)
        x, y = (best % 5 + 0.5) * 96, (best // 5 + 0.5) * 96
        pixel = browser.value(f"Array.from(byId('map').getContext('2d').getImageData({x}, {y}, 1, 1).data)")
        assert pixel == [*bytes.fromhex(page._palette("viridis"))[-3:], 255]

    says(0, 0, 0, 0)
    browser.press("Home")
    assert "class token takes" in browser.value("byId('said').textContent")
    says(0, 0, 0, 1)
    browser.press("ArrowDown")  # the first patch
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert "patch of row 1, column 1 takes" in browser.value("byId('said').textContent")
    says(0, 0, 0, 3 + 6)
    browser.press("ArrowDown", shift=True)
    browser.press("ArrowRight", shift=True)
    says(0, 1, 1, 3 + 6)
    browser.press("m")
    says(0, 1, None, 3 + 6)
    browser.press("m")
    browser.press("PageDown")
    browser.until("store[1].every(Boolean)")
    browser.frame()
    says(1, 1, 0, 3 + 6)
    browser.press(" ")  # held against the pointer
    left, top = browser.value("(box => [box.left, box.top])(byId('scene').getBoundingClientRect())")
    browser.point(left + 96 * 4.5, top + 96 * 3.5)
    says(1, 1, 0, 3 + 6)
    browser.point(left + 96 * 4.5, top + 96 * 3.5, click=True)
    says(1, 1, 0, 3 + 19)
    left, top = browser.value("(box => [box.left, box.top])(byId('heads').getBoundingClientRect())")
    browser.point(left + 35 * 2 + 9, top + 9, click=True)
    says(1, 0, 2, 3 + 19)
    browser.value("byId('sheet').focus()")
    browser.press("ArrowRight")
    says(1, 0, 3, 3 + 19)
    browser.press("ArrowRight")
    says(1, 0, None, 3 + 19)
    assert browser.value("document.title") == "a & b </script>"
    assert browser.value("byId('image').selectedOptions[0].textContent") == "image <!--<script>1"
    assert not browser.errors
    assert all(address.startswith(("file:", "data:", "blob:")) for address in browser.requests), browser.requests


def test_nothing_of_another_image_and_nothing_out_of_sight(browser: Browser, tmp_path: Path) -> None:
    written(MODELS["classed"], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.until("store[0].every(Boolean)")
    browser.frame()
    seen = "[byId('said').textContent, byId('map').style.opacity, sheetPixels.some(Boolean)]"
    assert browser.value(seen)[1:] == ["0.7", True]
    assert browser.value(f"(() => {{ showImage(1); draw(); return {seen}; }})()") == ["Unpacking.", "0", False]
    browser.until("store[1].every(Boolean)")
    browser.frame()
    assert browser.value(seen)[1:] == ["0.7", True]
    browser.value("(sheet => { sheet.style.width = '150px'; sheet.focus(); })(byId('sheet'))")
    for _ in range(3):
        browser.press("ArrowRight")
    box = "(of => [of.left, of.right])(byId('%s').getBoundingClientRect())"
    (left, right), (chosen, end) = (browser.value(box % name) for name in ("sheet", "chosen"))
    assert left <= chosen and end <= right + 1
    browser.value("void (showImage = async () => { throw Error('no inflating'); })")
    browser.press("PageUp")
    assert "cannot unpack the maps: Error: no inflating" in browser.value("byId('said').textContent")
    browser.errors.clear()


def test_small_maps_of_the_sheet_are_those_of_their_heads(browser: Browser, tmp_path: Path) -> None:
    """Of a pyramid, whose layers have patches of two sizes: the colour at the centre of each patch."""
    written(model := MODELS["pyramid"], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.until("store[0].every(Boolean)")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    table = bytes.fromhex(page._palette("viridis"))
    for number, layer in enumerate(choose(model.config)):
        wanted = choose(model.config)[layer]
        rows, cols = wanted.here.rows, wanted.here.cols
        query = {0: 1 + 12 + 1, 3: 0}.get(number, 1 + 0)  # row 1, column 1, which is in the first of larger patches
        row = expected(model, 0, layer)[1, query]
        low, top = np.percentile(row.numpy(), (1, 99))
        x, y = 35, number * 32  # the second head; a small map is 32 x 29 pixels, 3 apart
        got = browser.value(f"Array.from(byId('heads').getContext('2d').getImageData({x}, {y}, 32, 29).data)")
        pixels = np.array(got).reshape(29, 32, 4)
        for patch in range(rows * cols):
            at = [
                (part + 0.5) / of * size
                for part, of, size in zip(
                    divmod(patch, cols), (11 / (2 if number else 1), 12 / (2 if number else 1)), (29, 32), strict=True
                )
            ]
            if at[0] >= 29 or at[1] >= 32:
                continue
            part = np.clip((float(row[patch]) - low) / max(top - low, 1e-12), 0, 1)
            index = round(part * 255)
            near = [tuple(table[3 * i : 3 * i + 3]) for i in range(max(0, index - 4), min(256, index + 5))]
            assert tuple(pixels[int(at[0]), int(at[1]), :3]) in near, (layer, patch)
    assert not browser.errors


def test_what_a_page_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["classed"]
    wanted = choose(model.config)
    one = page.most_bytes(wanted, 1)
    assert 2 * 4 * 23 * (20 / 5 + 5) * 4 / 3 < one < 2 * 4 * 23 * (20 / 5 + 5) * 4 / 3 + 2 * 300
    monkeypatch.setattr(page, "_BESIDE", page.BYTES - one + 1)
    assert page.cells_of(wanted) == 2
    lines = written(model, tmp_path / "page.html")
    size = (tmp_path / "page.html").stat().st_size
    assert "cells are of 2 x 2 patches" in lines[1] and [path.name for path in tmp_path.iterdir()] == ["page.html"]
    for less, words in ((-3000, "2 images"), (1000, "the first 1 of 2 images: name fewer")):
        monkeypatch.setattr(page, "BYTES", size + page._SLACK - less)
        assert words in "".join(written(model, tmp_path / "page.html"))
        assert (tmp_path / "page.html").stat().st_size <= page.BYTES, less
    monkeypatch.setattr(page, "BYTES", 1_000)
    with pytest.raises(ConfigError, match=r"of one image take 0\.0 MB in the fewest shades: name fewer --layers"):
        written(model, tmp_path / "page.html")
    rows = model.capture(images_for(model))["blocks.1"].rows[:1]
    cells = page._in_cells(rows[..., 2:], (4, 5), 2, mean=False)
    assert torch.allclose(cells.sum(-1), rows[..., 2:].sum(-1))
    assert torch.allclose(cells[..., 2], rows[..., [6, 11]].sum(-1))
    assert torch.allclose(page._in_cells(rows[..., 2:], (4, 5), 2, mean=True)[..., 2], rows[..., [6, 11]].mean(-1))


def test_shades_are_as_many_as_there_is_room_for() -> None:
    rows = torch.randn(2, 2, 40, 64).softmax(-1)
    layers = [shades.Rows.of(x, torch.zeros(2, 40)) for x in rows]
    sizes = {n: sum(len(layer.coded(n, layer.way())) for layer in layers) for n in shades.SHADES}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for room, most in ((sizes[12], 12), (sizes[12] - 1, 10), (sizes[256], 256), (1, 3)):
        count, coded = shades.fitted(layers, room)
        assert count == most and sum(map(len, coded)) == sizes[most]
    low = rows.amin(-1, keepdim=True)
    height = (rows - low) / (rows.amax(-1, keepdim=True) - low)
    for count in (256, 24, 5):
        shown = ((height.sqrt() * 255).round() * (count - 1) / 255).round() / (count - 1)
        wrong = (height - shown**2).abs().flatten()
        told = float(wrong.mean()), float(wrong.quantile(0.99))
        assert shades.errors(layers, count) == pytest.approx(told, rel=0.1), count
