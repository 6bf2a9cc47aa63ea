"""Where a run's numbers go: metrics.jsonl, TensorBoard, the console and a progress bar. Rank 0 alone writes."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def set_aside(path: Path) -> Path | None:
    """Rename what an earlier run left at `path`: `metrics.jsonl` to `metrics.1.jsonl` and so on; gives the new name."""
    if not path.exists():
        return None
    names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    return path.rename(free)


class MetricsWriter:
    """Writes one JSON object per line, the same numbers to TensorBoard, and a console line in Megatron-LM's order.

    Args:
        run_dir: where `metrics.jsonl` and the TensorBoard events go; an earlier run's lines are set aside.
        steps: of the whole run.
        tensorboard: whether events are written.
    """

    def __init__(self, run_dir: Path, *, steps: int, global_batch_size: int, tensorboard: bool) -> None:
        self._steps, self._global_batch_size = steps, global_batch_size
        self.path = run_dir / "metrics.jsonl"
        set_aside(self.path)
        self._file: IO[str] = self.path.open("x")
        self._board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, on rank 0 alone

            self._board = SummaryWriter(str(run_dir))
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=not sys.stdout.isatty(), file=sys.stdout)

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        self._bar.update(steps)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl (null for NaN and Inf, which JSON lacks), and a point in each TensorBoard curve."""
        line = {"event": event, "step": step, **{name: _json_value(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, step)
            self._board.flush()  # a rank that fails later leaves without closing files

    def train(self, step: int, values: dict[str, Any]) -> None:
        """A training line."""
        self.write("train", step, values)
        v = values
        self.say(
            f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {step:8d}/{self._steps:8d} |"
            f" consumed samples: {v['samples']:12d} |"
            f" elapsed time per iteration (ms): {1000 * v['step_time']:.1f} |"
            f" images per second: {v['images_per_second']:.1f} |"
            f" learning rate: {v['lr']:.6E} |"
            f" global batch size: {self._global_batch_size:5d} |"
            f" loss: {v['loss']:.6E} |"
            f" loss scale: {v['loss_scale']:.1f} |"
            f" grad norm: {v['grad_norm']:.3f} |"
            f" number of skipped iterations: {v['skipped_steps']:3d} |"
        )

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """An evaluation line."""
        self.write("eval", step, values)
        self.say(
            f" evaluation at iteration {step:8d} | loss: {values['loss']:.6E} |"
            f" accuracy: {100 * values['accuracy']:.2f} % |"
            f" images: {values['images']:8d} |"
            + (f" EMA loss: {values['ema_loss']:.6E} |" if "ema_loss" in values else "")
            + (f" EMA accuracy: {100 * values['ema_accuracy']:.2f} % |" if "ema_accuracy" in values else "")
        )

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Finish all files."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _json_value(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
