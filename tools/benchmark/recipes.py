"""Recipes trained by `pretrain_vit.py` in processes of their own, and what their metrics say. For other benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Trained:
    """One run: the last evaluation, and seconds of the steps of each line."""

    accuracy: float
    loss: float
    step_times: list[float]


def train(recipe: str, run: Path, flags: Sequence[str]) -> Trained:
    """Train a recipe on all cores into the folder `run`. Raises CalledProcessError if that fails."""
    command = [sys.executable, "pretrain_vit.py", "--config", recipe, "--run_dir", str(run), *flags]
    subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "eval"][-1]
    times = [line["step_time"] for line in lines if line["event"] == "train"]
    return Trained(last["accuracy"], last["loss"], times)
