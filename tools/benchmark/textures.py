r"""`python -m tools.benchmark textures`: the texture recipes trained alike: accuracy and cost of each kind.

Every variant runs `pretrain_vit.py` on its recipe for each seed, in a process of its own, on all cores; accuracy is the
mean over seeds of the last evaluation, time the median step, memory what autograd keeps per image.

    python -m tools.benchmark textures --seeds 0 1 2 --json textures.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config.cli import parse
from model import MicroBatch, VisionTransformer
from parallel.process_group import World
from tools.benchmark.attention import kept_bytes
from tools.benchmark.recipes import train
from tools.benchmark.table import Row, show
from tools.options import add_json

VARIANTS = ("full", "window_grid", "linear", "mixed")


def main(argv: Sequence[str], world: World) -> None:
    """Train, and print a row per variant."""
    parser = argparse.ArgumentParser(prog="tools.benchmark textures", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = [_row(variant, options.seeds, flags, Path(folder)) for variant in options.variants]
    for row in rows:
        row["accuracy_over_full"] = row["accuracy"] / rows[0]["accuracy"] if options.variants[0] == "full" else None
    show(rows, options.json)


def _row(variant: str, seeds: Sequence[int], flags: Sequence[str], folder: Path) -> Row:
    recipe = f"configs/textures_{variant}.yaml"
    runs = [train(recipe, folder / f"{variant}-{seed}", [*flags, "--train.seed", str(seed)]) for seed in seeds]
    accuracies = [run.accuracy for run in runs]
    return {
        "recipe": recipe,
        "attention": str(parse(["--config", recipe])[0].model.attention or "full"),
        "accuracy": statistics.mean(accuracies),
        "accuracy_of_seeds": "  ".join(f"{a:.4f}" for a in accuracies),
        "step_time_ms": 1000 * statistics.median(time for run in runs for time in run.step_times),
        "kept_MiB_per_image": _kept(recipe) / 2**20,
    }


def _kept(recipe: str) -> float:
    model = VisionTransformer(parse(["--config", recipe])[0].model)
    batch = MicroBatch.of_images(torch.randn(4, model.sizes.channels, *model.sizes.image), training=True)
    return kept_bytes(lambda: model(batch), list(model.parameters())) / 4
