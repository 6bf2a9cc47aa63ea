r"""`python -m tools.benchmark faithful`: whether maps of attention say what a model goes by.

A small ViT is trained on composites, two handwritten digits of different classes in quarters of a crop of a photograph
(data.kind digits and textures), to name both. Then, on held-out digits and crops, each of the two classes is explained:

- pointing: how often the patch of the largest share lies on that class's digit (1/4 by chance);
- insertion, deletion: areas under the curves of the class's probability while patches come, or go, in the order of
  their shares (model.seeing.faithful).

Ways: relevance (Chefer et al.), gradient rollout, rollout, raw (the class token's row in the last layer, mean over
heads), random. Rollout and raw attention know no class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data import DataConfig, build_datasets
from model import ModelConfig, VisionTransformer
from model.kernels import tune_allocator
from model.seeing.faithful import areas, points
from model.seeing.rollout import back_through
from model.seeing.trace import map_of, mean_trace, trace
from parallel.process_group import World
from tools.benchmark.table import Row, show
from tools.options import add_json

_DIGIT, _PATCH, _CLASSES = 8, 4, 10
_SIDE = 2 * _DIGIT
_CONTRAST = 0.5  # of the crop behind digits


class Composites(NamedTuple):
    """B images [B, 1, 16, 16]; labels: int64 [B, 2], of two digits; quarters: int64 [B, 2], where they are."""

    images: Tensor
    labels: Tensor
    quarters: Tensor

    def inside(self, which: int) -> Tensor:
        """Patches that show one of the digits: bool [B, 4, 4]."""
        quarters = torch.arange(4).view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
        return quarters == self.quarters[:, which, None, None]


class Maker:
    """Composites of digits and crops that are trained on, or held out."""

    def __init__(self, *, held_out: bool) -> None:
        self._digits, self._labels = _read("digits", _DIGIT, held_out)
        self._crops, _ = _read("textures", _SIDE, held_out)

    def make(self, count: int, seed: int) -> Composites:
        """So many."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randint, generator=generator)
        first, second = (draw(len(self._digits), (count,)) for _ in range(2))
        while (same := self._labels[first] == self._labels[second]).any():
            second = torch.where(same, draw(len(self._digits), (count,)), second)
        quarters = torch.rand(count, 4, generator=generator).argsort(1)[:, :2]
        images = self._crops[draw(len(self._crops), (count,))] * _CONTRAST
        everyone = torch.arange(count)
        cells = images.view(count, 2, _DIGIT, 2, _DIGIT)
        for digits, quarter in ((first, quarters[:, 0]), (second, quarters[:, 1])):
            place = everyone, quarter // 2, slice(None), quarter % 2
            ink = self._digits[digits, 0]
            cells[place] = cells[place] * (1 - ink) + ink
        labels = torch.stack([self._labels[first], self._labels[second]], 1)
        return Composites((images - 0.4) / 0.3, labels, quarters)


def _read(kind: str, side: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Pixels [N, 1, side, side] in 0..1, and labels."""
    classes = _CLASSES if kind == "digits" else None
    config = DataConfig(kind=kind)  # type: ignore[arg-type]
    sets = build_datasets(config, image_size=(side, side), channels=1, num_classes=classes, seed=0)
    of = sets[held_out]
    return of.read(np.arange(len(of))), torch.from_numpy(of.labels)


def trained(steps: int, *, width: int = 64, depth: int = 4, batch: int = 64, seed: int = 0) -> VisionTransformer:
    """A ViT that names both digits."""
    torch.manual_seed(seed)
    config = ModelConfig(
        image_size=_SIDE, patch_size=_PATCH, in_channels=1, num_classes=_CLASSES, width=width, depth=depth,
        num_heads=4, mlp_dim=2 * width, block="sequential", pool="cls", position="learned_1d",
    )  # fmt: skip
    model, maker = VisionTransformer(config, seed=seed).train(), Maker(held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        made = maker.make(batch, seed * steps + step)
        wanted = F.one_hot(made.labels, _CLASSES).sum(1).float()
        loss = F.binary_cross_entropy_with_logits(model.logits(made.images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


def maps_of(model: VisionTransformer, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """[B, rows, cols] by ways, of a class for each image."""

    explained, _ = trace(model, images, lambda outputs: outputs.gather(1, classes[:, None])[:, 0])
    noted, _ = mean_trace(model, images)
    raw = model.capture(images, layers=[-1], queries="class")[f"blocks.{model.sizes.depth - 1}"].maps[:, :, 0].mean(1)
    return {
        "relevance": map_of(model.config, back_through(explained, "relevance")),
        "gradient_rollout": map_of(model.config, back_through(explained, "gradient_rollout")),
        "rollout": map_of(model.config, back_through(noted, "rollout")),
        "raw": raw,
        "random": torch.rand(raw.shape, generator=torch.Generator().manual_seed(0)),
    }


def scored(model: VisionTransformer, count: int = 512) -> list[Row]:
    """A row for each way, means over both classes of so many held-out composites; and how often both are named."""
    made = Maker(held_out=True).make(count, 1)
    with torch.no_grad():
        best = model.logits(made.images).topk(2, 1).indices.sort(1).values
    named = float((best == made.labels.sort(1).values).all(1).float().mean())
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for which in range(2):
        classes = made.labels[:, which]
        for way, maps in maps_of(model, made.images, classes).items():
            under = areas(_probability(model, classes), made.images, maps)
            pointed = points(maps, made.inside(which)).float()
            found.setdefault(way, []).append((pointed, under.insertion, under.deletion))
    return [
        {"way": way, "both_named": named}
        | {
            name: float(torch.cat(column).mean())
            for name, column in zip(("pointing", "insertion", "deletion"), zip(*parts, strict=True), strict=True)
        }
        for way, parts in found.items()
    ]


def _probability(model: VisionTransformer, classes: Tensor) -> Callable[[Tensor], Tensor]:
    def probability(shown: Tensor) -> Tensor:
        logits = model.logits(shown)
        return logits.gather(1, classes.repeat(len(shown) // len(classes))[:, None])[:, 0].sigmoid()

    return probability


def main(argv: Sequence[str], world: World) -> None:
    """Train, explain, and print."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark faithful", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of training (default 600)")
    parser.add_argument("--images", type=int, default=512, help="held-out composites (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args(argv)
    tune_allocator()
    show(scored(trained(options.steps, seed=options.seed), options.images), options.json)
