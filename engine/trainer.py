"""The run: validate, set up, loop, evaluate, report."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from data import Dataset, EvalStream, TrainStream, build_datasets
from engine.assemble import assemble, grid_of
from engine.config import Config
from engine.device import (
    choose_device,
    memory_share,
    peak_memory_bytes,
    peak_tflops,
    prepare_cpu,
    set_matmul,
    synchronise,
)
from engine.errors import ConfigError, DivergedError
from engine.finite import check_finite
from engine.metrics import MetricsWriter
from engine.objectives import make_objective
from engine.precision import check_kernels, check_precision
from engine.profile import StepProfiler
from engine.report import startup_report
from engine.schedules import check_schedule, factor
from engine.step import Stepper, StepResult
from model import training_flops
from model.kernels import Kernels
from parallel import comm, process_group
from parallel.process_group import World


def pretrain(config: Config, world: World) -> None:
    """Train as `config` says. Everything that can be refused is refused before ranks talk to each other.

    Raises:
        ConfigError: what is asked for cannot be. DivergedError: NaN or Inf that skipping did not cure.
        parallel.comm.PeerLostError: another rank is gone.
    """
    config = config.resolve(world.size)
    run_dir = prepare_run_dir(config.run_dir)
    train_set, eval_set = _datasets(config)
    steps = total_steps(config, len(train_set))
    check_schedule(config.schedule, steps)
    check_profile(config, steps)
    device = choose_device(config.device, world)
    check_precision(config.precision, device)
    check_kernels(Kernels(config.kernels), device)
    threads, matmul = prepare_cpu(world), set_matmul(config.precision, device)
    objective = make_objective(config)

    process_group.start(world, device, config.parallel.timeout)
    grid = grid_of(config, world, device)
    assembly = assemble(config, grid, device, objective, device_memory=memory_share(device, world))
    report = startup_report(
        assembly, threads=threads, matmul=matmul, train_images=len(train_set), eval_images=len(eval_set)
    )
    writer = None
    if world.rank == 0:
        (run_dir / "config.yaml").write_text(config.to_yaml())
        writer = MetricsWriter(
            run_dir,
            steps=steps,
            global_batch_size=config.train.global_batch_size,
            tensorboard=config.log.tensorboard,
        )
        for line in report:
            writer.say(line)
    traced = config.log.profile_steps
    profiler = StepProfiler(traced, run_dir / "profile", world.rank) if traced else None
    Loop(Stepper(assembly), train_set, eval_set, steps=steps, writer=writer, profiler=profiler).run()
    if writer is not None:
        writer.close()
        print(f"config      {run_dir / 'config.yaml'}\nmetrics     {writer.path}")
        if config.log.tensorboard:
            print(f"TensorBoard {run_dir} (tensorboard --logdir {run_dir})")
        if profiler is not None:
            print(f"traces      {profiler.path.parent}")
    process_group.stop()  # not after a failure: the others may be gone, or waiting


def prepare_run_dir(run_dir: str | None) -> Path:
    """Make the folder and see that it can be written to. Raises ConfigError if not."""
    if run_dir is None:
        raise ConfigError("run_dir is not set: give the folder for metrics and config, e.g. --run_dir runs/demo")
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"run_dir {run_dir} cannot be written to ({error.strerror}): choose a folder that can be"
        ) from error
    return path


def check_profile(config: Config, steps: int) -> None:
    """Raise ConfigError where steps to be traced are not part of the run."""
    traced = config.log.profile_steps
    if traced is not None and traced[1] > steps:
        raise ConfigError(f"log.profile_steps {list(traced)} reaches beyond the {steps} steps of the run: lower it")


def total_steps(config: Config, train_images: int) -> int:
    """Steps of the run. Epochs count as the decimal number that was written: 1.1 is eleven tenths, to the last step."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(Fraction(repr(config.train.epochs)) * train_images / config.train.global_batch_size))


def _datasets(config: Config) -> tuple[Dataset, Dataset]:
    sizes = config.model.sizes
    try:
        return build_datasets(
            config.data,
            image_size=sizes.image,
            channels=sizes.channels,
            num_classes=sizes.classes,
            seed=config.train.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass
class _Interval:
    """What happened since the last line."""

    started: float
    steps: int = 0


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
        self.flops_per_image = training_flops(a.layers)
        self.skipped = self.bad_in_a_row = 0

    def run(self) -> None:
        """All steps of the run, with evaluations between and after them."""
        interval = _Interval(time.perf_counter())
        for step, batches in zip(range(self.steps), self.train_stream.steps(0), strict=False):
            if self.profiler is not None:
                self.profiler.before(step + 1)
            lr_factor = factor(self.config.schedule, self.stepper.assembly.optimizer.steps, self.steps)
            lr = self.config.optimizer.lr * lr_factor
            result = self.stepper.train_step(batches, lr, lr_factor)
            if self.profiler is not None:
                self.profiler.after(step + 1)
            self._count_bad(result, step)
            interval.steps += 1
            last = step + 1 == self.steps
            if self.writer is not None:
                self.writer.advance()
            if last or (step + 1) % self.config.log.interval == 0:
                self._report(step + 1, result, lr, interval)
                interval = _Interval(time.perf_counter())
            every = self.config.train.eval_interval
            if last or (every and (step + 1) % every == 0):
                evaluated = self._evaluate(step + 1)
                if last:
                    self._check_end(evaluated)
                interval = _Interval(time.perf_counter())

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
        step_time = (time.perf_counter() - interval.started) / max(1, interval.steps)
        memory = torch.tensor([float(peak_memory_bytes(a.device))], dtype=torch.float64, device=a.device)
        memory = comm.all_reduce(memory, a.grid.world, "max")
        images_per_second = batch / step_time
        tflops = self.flops_per_image * images_per_second / a.grid.shape.world_size / 1e12
        peak = peak_tflops(a.device, self.config.precision.dtype)
        values = {
            "samples": step * batch,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "skipped_steps": self.skipped,
            "step_time": step_time,
            "images_per_second": images_per_second,
            "tokens_per_second": images_per_second * self.config.model.sizes.tokens,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
            "peak_memory": int(memory.item()),
        }
        if self.writer is not None:
            self.writer.train(step, values)

    def _evaluate(self, step: int) -> Mapping[str, float]:
        result = self.stepper.evaluate(self.eval_stream)
        values = dict(result)
        if self.stepper.assembly.average is not None:
            averaged = self.stepper.evaluate_average(self.eval_stream)
            values |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
        if self.writer is not None:
            self.writer.evaluation(step, values)
        return result
