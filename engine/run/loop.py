"""The loop over the steps of a run: train, evaluate, report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from data import Dataset, EvalStream, TrainStream
from engine.device import peak_memory_bytes, peak_tflops, synchronise
from engine.errors import DivergedError
from engine.optimizers.schedules import factor
from engine.run.finite import check_finite
from engine.run.metrics import MetricsWriter
from engine.run.profile import StepProfiler
from engine.run.step import Stepper, StepResult
from model import training_flops
from parallel import comm


@dataclass
class _Interval:
    """What happened since the last line.

    Attributes:
        waited_before: seconds for data until then. steps: how many. losses: of those that were not skipped.
        paused: seconds for evaluation.
    """

    waited_before: float
    started: float = field(default_factory=lambda: time.perf_counter())
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    paused: float = 0.0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.losses += [] if result.skipped else [result.loss]

    @property
    def seconds(self) -> float:
        """That training took."""
        return time.perf_counter() - self.started - self.paused


class Loop:
    """Steps, evaluations and their reports.

    Args:
        stepper: runs steps. train_set, eval_set: images. steps: of the whole run.
        writer: on rank 0 alone. profiler: traces some of the steps.
    """

    def __init__(
        self,
        stepper: Stepper,
        train_set: Dataset,
        eval_set: Dataset,
        *,
        steps: int,
        writer: MetricsWriter | None,
        profiler: StepProfiler | None = None,
    ) -> None:
        self.stepper, self.steps, self.writer, self.profiler = stepper, steps, writer, profiler
        a = stepper.assembly
        self.config = a.config
        micro = a.config.train.micro_batch_size
        assert micro is not None
        place: dict[str, Any] = {
            "config": a.config.data,
            "micro_batch_size": micro,
            "data_rank": a.grid.data.index,
            "data_size": a.grid.data.size,
            "with_images": a.holds_images,
        }
        self.train_stream = TrainStream(
            train_set, global_batch_size=a.config.train.global_batch_size, seed=a.config.train.seed, **place
        )
        self.eval_stream = EvalStream(eval_set, **place)
        self.images_per_epoch = len(train_set)
        self.flops_per_image = training_flops(a.layers)
        self.skipped = self.bad_in_a_row = 0

    def run(self) -> None:
        """All steps of the run, with evaluations between and after them."""
        interval = _Interval(self.train_stream.waited)
        for step, batches in zip(range(self.steps), self.train_stream.steps(0), strict=False):
            if self.profiler is not None:
                self.profiler.before(step + 1)
            lr_factor = factor(self.config.schedule, self.stepper.assembly.optimizer.steps, self.steps)
            lr = self.config.optimizer.lr * lr_factor
            result = self.stepper.train_step(batches, lr, lr_factor)
            if self.profiler is not None:
                self.profiler.after(step + 1)
            self._count_bad(result, step)
            interval.add(result)
            last = step + 1 == self.steps
            if self.writer is not None:
                self.writer.advance(result.loss)
            if last or (step + 1) % self.config.log.interval == 0:
                self._report(step + 1, result, lr, interval)
                interval = _Interval(self.train_stream.waited)
            every = self.config.train.eval_interval
            if last or (every and (step + 1) % every == 0):
                began = time.perf_counter()
                evaluated = self._evaluate(step + 1)
                if last:
                    self._check_end(evaluated)
                interval.paused += time.perf_counter() - began

    def _count_bad(self, result: StepResult, step: int) -> None:
        self.skipped += result.skipped
        if result.culprit is not None and self.writer is not None:
            self.writer.say(f" step {step + 1} skipped: {result.culprit}")
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "culprit": result.culprit}
            self.writer.write("bad_step", step + 1, values)
        if not result.skipped:
            self.bad_in_a_row = 0
        self.bad_in_a_row += result.bad
        if self.bad_in_a_row >= min(self.config.train.max_bad_steps, self.steps):
            raise DivergedError(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; first: "
                f"{result.culprit}. {self.bad_in_a_row} steps in a row had to be skipped "
                "(train.max_bad_steps). Lower optimizer.lr, warm up longer, or check the data"
            )

    def _check_end(self, evaluated: Mapping[str, float]) -> None:
        """Raise DivergedError where what was trained is no model: bad steps too few to end the run may hide that."""
        check_finite(self.stepper.assembly, self.steps)
        for name, value in evaluated.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"step {self.steps}: the weights are finite, but the {name} of the evaluation is {value}. Lower "
                    "optimizer.lr, warm up longer, or check the data"
                )

    def _report(self, step: int, result: StepResult, lr: float, interval: _Interval) -> None:
        a, batch = self.stepper.assembly, self.config.train.global_batch_size
        synchronise(a.device)
        step_time = interval.seconds / interval.steps
        own = [float(peak_memory_bytes(a.device)), (self.train_stream.waited - interval.waited_before) / interval.steps]
        most = comm.all_reduce(torch.tensor(own, dtype=torch.float64, device=a.device), a.grid.world, "max")
        memory, waited = most.tolist()
        images_per_second = batch / step_time
        tflops = self.flops_per_image * images_per_second / a.grid.shape.world_size / 1e12
        peak = peak_tflops(a.device, self.config.precision.dtype)
        values = {
            "samples": step * batch,
            "loss": statistics.fmean(interval.losses or [result.loss]),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "skipped_steps": self.skipped,
            "step_time": step_time,
            "images_per_second": images_per_second,
            "tokens_per_second": images_per_second * self.config.model.sizes.tokens,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
            "peak_memory": int(memory),
            "epoch": step * batch / self.images_per_epoch,
            "data_time": waited,
        }
        if self.writer is not None:
            self.writer.train(step, values)

    def _evaluate(self, step: int) -> Mapping[str, float]:
        synchronise(self.stepper.assembly.device)
        began = time.perf_counter()
        result = self.stepper.evaluate(self.eval_stream)
        values = dict(result)
        if self.stepper.assembly.average is not None:
            averaged = self.stepper.evaluate_average(self.eval_stream)
            values |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
        values |= {"epoch": step * self.config.train.global_batch_size / self.images_per_epoch}
        if self.writer is not None:
            self.writer.evaluation(step, values | {"eval_time": time.perf_counter() - began})
        return result
