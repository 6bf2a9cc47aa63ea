"""`python -m tests.tools.page_figures FOLDER [CASE...]`: the page of a model of 24 layers x 16 heads x 256 patches.

Prints the page's size, shades and errors, how long it takes to write, to unpack, and to draw a frame: the large map,
the 384 small ones and 24 means. Of attention out of random queries and keys, of which nothing can be compressed, their
scores of deviation 1 and 3; and of a random model that looks at a photograph, whose scores are that large, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, VisionTransformer
from model.seeing.capture import Attended, Wanted, choose
from tests.tools.browser import Browser
from tools.convert.images import photographs
from tools.visualize.page import Page, write_page
from tools.visualize.pictures import Scene

CONFIG = ModelConfig(
    image_size=256, patch_size=16, width=1024, depth=24, num_heads=16, mlp_dim=1024, num_classes=10, pool="gap",
    block="sequential", qk_norm=False,
).resolve()  # fmt: skip
Capture = Callable[[Tensor, Mapping[str, Wanted]], dict[str, Attended]]


def random(deviation: float) -> Capture:
    """Rows of scores that are products of 64 independent features."""
    generator = torch.Generator().manual_seed(0)

    def rows() -> Tensor:
        q, k = (torch.randn(1, 16, 256, 64, generator=generator) for _ in range(2))
        return (q @ k.transpose(-1, -2) * (deviation / 8)).softmax(-1)

    return lambda image, wanted: {name: Attended(rows=rows(), wanted=of) for name, of in wanted.items()}


def looking(deviation: float) -> Capture:
    """A random model, whose queries and keys are made as large as such scores want."""
    model = VisionTransformer(CONFIG)
    for name, weight in model.named_parameters():
        if name.endswith("qkv.weight"):
            weight.data[: 2 * 1024] *= deviation**0.5
    return lambda image, wanted: model.capture(image)


def main(folder: Path, only: Sequence[str]) -> None:
    """Write the pages there, those of some cases or all, and print."""
    image = photographs(3, (256, 256), None)[:1]
    low, high = image.amin(), image.amax()
    scene = Scene("china", ((image[0] - low) / (high - low)).permute(1, 2, 0).numpy(), 16)
    cases = {"random-1": lambda: random(1.0), "random-3": lambda: random(3.0), "looking": lambda: looking(4.0)}
    for name, capture in ((name, cases[name]()) for name in only or cases):
        path, began = folder / f"{name}.html", time.perf_counter()
        lines = write_page(path, Page.of(name, CONFIG, choose(CONFIG), [scene]), capture, image)
        print(f"{lines[0]}; written in {time.perf_counter() - began:.1f} s", flush=True)
        with Browser(folder) as browser:
            began = time.perf_counter()
            browser.open(path)
            browser.until("store[0].every(Boolean)")
            unpacked = time.perf_counter() - began
            each = browser.value(
                "(() => { const start = performance.now(); for (let i = 0; i < 256; i++) { state.token = 1 + i; "
                "draw(); } return (performance.now() - start) / 256; })()"
            )
            shown = browser.value(
                "new Promise(done => { let count = 0; const start = performance.now(); const next = () => { "
                "change({token: 1 + count % 256}); if (count++ < 120) requestAnimationFrame(next); "
                "else done(120e3 / (performance.now() - start)); }; next(); })"
            )
            browser.screenshot(folder / f"{name}.png")
        print(f"  unpacked in {unpacked:.1f} s, {each:.1f} ms a frame, {shown:.0f} frames a second shown", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
