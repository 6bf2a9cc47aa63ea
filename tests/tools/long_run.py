"""`python -m tests.tools.long_run LINES`: what `tools.plot` takes for so many training lines: time and memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def main(lines: int) -> None:
    """Write, draw, print."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        with metrics.open("w") as file:
            for step in range(1, lines + 1):
                file.write(json.dumps(_line(step)) + "\n")
        subprocess.run([sys.executable, "-m", "tools.plot", folder], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{lines} lines, {metrics.stat().st_size / 1e6:.0f} MB: {used.ru_utime + used.ru_stime:.1f} s of CPU, "
            f"at most {used.ru_maxrss / 1024:.0f} MiB"
        )


def _line(step: int) -> dict[str, object]:
    noise = step * 0.6180339887498949 % 1
    return {
        "event": "train", "step": step, "samples": 1024 * step, "loss": 7 / step**0.1 + noise, "lr": 1e-3 / step**0.5,
        "grad_norm": 1 + noise, "loss_scale": 1.0, "skipped_steps": 0, "step_time": 0.5 + noise / 100,
        "images_per_second": 2048 - noise, "tokens_per_second": 401408 - noise, "tflops_per_device": 99 + noise,
        "mfu": 0.4 + noise / 100, "peak_memory": 41610444800, "epoch": step * 8e-4, "data_time": noise / 1e3,
        "wall_time": 1.7e9 + 0.5 * step,
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
