r"""`python -m tools.benchmark precision`: a recipe trained in each number format, over several seeds.

    python -m tools.benchmark precision --seeds 0 1 2 3 4 --json precision.json

Formats take turns, seed by seed. Other options are those of pretrain_vit.py. On a CPU, fp8 is emulated, and bf16 and
fp16 go through fp32 where the processor does not multiply them: times say nothing about a GPU then.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from parallel.process_group import World
from tools.benchmark.recipes import Trained, train
from tools.benchmark.table import Row, show
from tools.options import add_json

FORMATS = ("fp32", "bf16", "fp16", "fp8")


def main(argv: Sequence[str], world: World) -> None:
    """Train, and print a row per format."""
    parser = argparse.ArgumentParser(prog="tools.benchmark precision", description=__doc__)
    parser.add_argument("--recipe", default="configs/digits.yaml", help="YAML file (default configs/digits.yaml)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    # the recipe's own layout may need several ranks: one process here
    flags = ["--parallel.tensor_parallel_size", "1", "--parallel.pipeline_parallel_size", "1", *flags]
    runs: dict[str, list[Trained]] = {dtype: [] for dtype in options.formats}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for dtype in options.formats:
                own = ["--precision.dtype", dtype, "--train.seed", str(seed)]
                runs[dtype].append(train(options.recipe, Path(folder) / f"{dtype}-{seed}", [*flags, *own]))
    show([_row(dtype, runs[dtype], runs[options.formats[0]]) for dtype in options.formats], options.json)


def _row(dtype: str, runs: Sequence[Trained], first: Sequence[Trained]) -> Row:
    accuracy, base = (statistics.mean(run.accuracy for run in group) for group in (runs, first))
    return {
        "dtype": dtype,
        "accuracy": accuracy,
        "points_over_first": 100 * (accuracy - base),
        "accuracy_of_seeds": "  ".join(f"{run.accuracy:.4f}" for run in runs),
        "loss": statistics.mean(run.loss for run in runs),
        "step_time_ms": 1000 * statistics.median(time for run in runs for time in run.step_times),
    }
