"""What every training benchmark does first: parse, start ranks, assemble the engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch

from data import Batch, DataConfig, TrainStream, build_datasets
from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.config import Config
from engine.config.cli import parse
from engine.config.objectives import text_shape
from engine.device import choose_device, memory_share, prepare_cpu, set_matmul, synchronise
from engine.passes import settle_passes
from engine.precision.precision import DTYPES
from engine.recompute_choice import settled
from engine.run.step import Stepper
from parallel import process_group
from parallel.process_group import World
from parallel.tensor.products import linear

_GEMM = 2048


@dataclass(frozen=True)
class Bench:
    """A configuration on this rank, ready to step."""

    config: Config
    world: World
    assembly: Assembly
    batches: list[list[Batch]]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.assembly.device


def read_config(flags: Sequence[str]) -> Config:
    """The configuration from --config and dotted flags; random images unless data.kind is set by hand."""
    config, _ = parse([*flags, "--train.steps", "1"] if "--train.steps" not in flags else flags, "tools.benchmark")
    return replace(config, train=replace(config.train, epochs=None))


@contextmanager
def started(config: Config, world: World, distinct_batches: int = 2) -> Iterator[Bench]:
    """The engine on all ranks, and a few batches of random images of the model's shape."""
    config = replace(config, data=DataConfig(kind="synthetic", size=config.train.global_batch_size))
    config = config.resolve(world.size)
    device = choose_device(config.device, world)
    prepare_cpu(world)
    set_matmul(config.precision, device)
    process_group.start(world, device, config.parallel.timeout)
    try:
        grid = grid_of(config, world, device)
        memory = memory_share(device, world)
        config, _ = settle_passes(config, grid, memory, on_cpu=device.type == "cpu")
        config, _ = settled(config, grid, device, memory)
        assembly = assemble(config, grid, device)
        steps = islice(stream_of(assembly).steps(0), distinct_batches)
        yield Bench(config, world, assembly, [list(step) for step in steps])
    finally:
        process_group.stop()


def stream_of(a: Assembly) -> TrainStream:
    """Random images of the model's shape, as a rank reads them."""
    sizes, train = a.config.model.sizes, a.config.train
    assert train.micro_batch_size is not None
    images, _ = build_datasets(
        a.config.data,
        image_size=sizes.image,
        channels=sizes.channels,
        num_classes=sizes.classes or None,
        seed=train.seed,
        text=text_shape(a.config),
        patch_size=sizes.patch,
    )
    return TrainStream(
        images,
        config=a.config.data,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_rank=a.grid.data.index,
        data_size=a.grid.data.size,
        seed=train.seed,
        with_images=a.holds_images,
        with_texts=a.holds_texts,
    )


@dataclass(frozen=True)
class StepTimes:
    """What this rank saw of steps, in order: seconds of each, CPU seconds of all threads in it, and the share of it
    that was spent waiting in communication.
    """

    seconds: list[float]
    cpu: list[float]
    waited: list[float]


def time_steps(bench: Bench, steps: int, warmup: int, between: Callable[[], object] = lambda: None) -> StepTimes:
    """Take `steps` training steps after `warmup` that do not count. Collective.

    Args:
        between: called before each step that counts, and after the last.
    """
    stepper, meter = Stepper(bench.assembly), bench.assembly.grid.meter
    times = StepTimes([], [], [])
    for step in range(warmup + steps):
        if step >= warmup:
            between()
        meter.reset()
        batches, cpu = bench.batches[step % len(bench.batches)], time.process_time()
        elapsed = seconds(lambda batches=batches: stepper.train_step(batches, 1e-4), bench.device)  # type: ignore[misc]
        if step >= warmup:
            times.seconds.append(elapsed)
            times.cpu.append(time.process_time() - cpu)
            times.waited.append(meter.total_seconds / elapsed)
    between()
    return times


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, work on the device included."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def gemm_tflops(device: torch.device, dtype: str, rounds: int = 7) -> float:
    """This rank's measured rate of matrix products of 2048 x 2048 in the run's format (fp8: bf16), all ranks at it at
    once; the median.
    """
    a, b = torch.randn(2, _GEMM, _GEMM, device=device).to(DTYPES[dtype])
    times = [seconds(lambda: linear(a, b), device) for _ in range(rounds)]
    return 2 * _GEMM**3 / statistics.median(times[1:]) / 1e12
