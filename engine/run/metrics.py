"""Where a run's numbers go: metrics.jsonl, TensorBoard, the console and a progress bar. Rank 0 alone writes."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.errors import OutputError
from engine.run.board import Board
from engine.run.data_wait import STARVED
from engine.run.journal import Journal

COLUMNS = 110  # of a line where the console is no terminal, which has a width of its own


class MetricsWriter:
    """Writes one JSON object per line, the same numbers to TensorBoard, and a console line in Megatron-LM's order.

    Args:
        run_dir: where `metrics.jsonl` and the TensorBoard events go; without those of an earlier run, or cut back to
        where this one goes on (see engine.run.run_dir).
        steps: of the whole run.
        tensorboard: whether events are written.
        resumed_at: the step that is done; files go on. None: a new run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        steps: int,
        global_batch_size: int,
        tensorboard: bool,
        resumed_at: int | None = None,
    ) -> None:
        self._steps, self._samples = steps, steps * global_batch_size
        self.path = run_dir / "metrics.jsonl"
        is_terminal = sys.stdout.isatty()
        self._bar = tqdm(
            total=steps,
            initial=resumed_at or 0,
            unit="step",
            dynamic_ncols=True,
            disable=not is_terminal,
            file=sys.stdout,
        )
        goes_on = resumed_at is not None
        self._journal = Journal(self.path, self.say, goes_on=goes_on)
        self._board = Board(run_dir, self.say, goes_on=goes_on) if tensorboard else None

    def describe(self, config: str, keys: Mapping[str, Any]) -> None:
        """The run's configuration for TensorBoard: as YAML, and as dotted keys to compare runs by; once a file."""
        if self._board is not None and self._board.is_new:
            self._board.text("config", f"```yaml\n{config}```")
            self._board.hyperparameters(keys, ("train/loss", "eval/loss", "eval/accuracy"))

    def advance(self, loss: float) -> None:
        """Move the progress bar by a step, of which it shows the loss."""
        self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self._bar.update()

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, with the time in seconds since 1970, and a point in each TensorBoard curve. JSON
        has null for NaN and Inf.
        """
        numbers = {name: _json_value(value) for name, value in values.items()}
        line = {"event": event, "step": step, **numbers, "wall_time": round(time.time(), 3)}
        self._journal.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        if self._board is not None:
            curves = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            self._board.scalars(curves, step)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """A picture for TensorBoard."""
        if self._board is not None:
            self._board.picture(name, step, png)

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """A training line."""
        self.write("train", step, values)
        v, width = values, len(str(self._steps))
        parts = {  # of constant width as far as can be, so that the lines of a run keep the same parts
            "step": f"step {step:{width}d}/{self._steps}",
            "samples": f"samples {v['samples']:{len(str(self._samples))}d}",
            "time": f"{1000 * v['step_time']:6.1f} ms",
            "speed": f"{v['images_per_second']:6.1f} img/s",
            "rate": f"lr {v['lr']:.2E}",
            "loss": f"loss {v['loss']:<7.4g}",
            "scale": f"scale {v['loss_scale']:g}" if v["loss_scale"] != 1 else "",
            "norm": f"norm {v['grad_norm']:.3f}",
            "bubble": f"bubble {100 * v['bubble']:4.1f} %" if v.get("bubble") is not None else "",
            "data": f"data wait {v['data_wait']:.1f} ms" if _is_starved(v) else "",
            "skipped": f"skipped {v['skipped_steps']}" if v["skipped_steps"] else "",
        }
        self.say(fitting(parts, ("samples", "bubble", "speed", "clock", "time", "scale", "data")))

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """An evaluation line."""
        self.write("eval", step, values)
        parts = {"step": f"evaluation at step {step}"}
        for name in (name for name in values if name not in ("epoch", "eval_time")):
            shown, value = name.replace("ema_", "EMA "), values[name]
            parts[name] = f"{shown} {100 * value:.2f} %" if name.endswith("accuracy") else f"{shown} {value:.4g}"
        self.say(fitting(parts, ("images", "clock")))

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar; on a terminal, longer ones break between words."""
        if not self._bar.disable:
            line = textwrap.fill(line, _columns(), subsequent_indent="    ", break_long_words=False)
        try:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # else what is in its buffer fails again when the process ends
            raise OutputError(f"the console cannot be written to: {error.strerror}") from error

    def sync(self) -> None:
        """See that what was written outlives a power cut: before a checkpoint is complete, which must not know of steps
        that the files lack.
        """
        self._journal.sync()
        if self._board is not None:
            self._board.sync()

    def close(self) -> None:
        """Finish all files. Raises OutputError if one is not complete."""
        with ExitStack() as stack:
            stack.callback(self._journal.close)
            if self._board is not None:
                stack.callback(self._board.close)
            stack.callback(self._bar.close)


def fitting(parts: Mapping[str, str], dispensable: Sequence[str]) -> str:
    """The time of day and the parts that are not empty in one line, without as many of `dispensable`, in that order, as
    do not fit the console. (metrics.jsonl has all numbers.)
    """
    shown = {name: text for name, text in parts.items() if text}
    clock = time.strftime("[%H:%M:%S] ")
    line = lambda: clock + " | ".join(shown.values())  # noqa: E731
    for name in dispensable:
        if len(line()) <= _columns():
            break
        shown.pop(name, None)
        clock = "" if name == "clock" else clock
    return line()


def _is_starved(values: Mapping[str, Any]) -> bool:
    """Whether a training line tells of waiting for data that matters."""
    return bool(values.get("data_wait", 0.0) > 1e3 * STARVED * values["step_time"])


def _columns() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else COLUMNS


def _json_value(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
