"""A rank of one layout of a sweep: `python -m tools.benchmark.sweep.run TASK`, started by tools.benchmark.sweep.ranks.

TASK is a JSON file that all ranks can read. The first rank writes what they have measured beside it, whole or not at
all: files are what hosts of a cluster share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from parallel import parent

if __name__ == "__main__":  # before the imports below, which take seconds
    parent.end_with_parent()
    parent.end_by_interrupt()
    parent.spin_briefly()

import json
import os
import platform
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.device import peak_memory_bytes, peak_tflops, processor
from engine.errors import ConfigError
from engine.run.launch import run_rank
from engine.run.provenance import machine, version
from parallel import comm
from parallel.process_group import World
from tools.benchmark.bench import Bench, gemm_tflops, read_config, seconds, started, time_steps
from tools.benchmark.table import Row
from tools.benchmark.timing import quartiles


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all ranks are to do.

    Attributes:
        config: YAML file with the keys that are not at their defaults. ranks: how many there are to be. result: file
            for what was measured. steps: measured ones. warmup: those before. turns: two names of named pipes, to each
            of which a rank adds its number: where it is told that a step is its own, and where it tells so; none: all
            steps are. first: whether it takes the first. parent: the process that has started this one, if it is of
            this host.
    """

    config: str
    ranks: int
    result: str
    steps: int
    warmup: int
    turns: tuple[str, str] | None = None
    first: bool = True
    parent: int | None = None


def main(argv: Sequence[str], world: World) -> None:
    """Measure, and have the first rank write it down."""
    task = Task(**json.loads(Path(argv[0]).read_text()))
    if task.parent not in (None, os.getppid()):  # it went before this process had asked to end with it
        raise RuntimeError("the sweep that has started this rank is gone")
    if world.size != task.ranks:
        raise ConfigError(f"--launch has started a world of {world.size} ranks, not the {task.ranks} of this layout")
    try:
        with started(read_config(["--config", task.config]), world) as bench:
            row = measure(bench, task)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        print(f"out of memory: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # others may wait for this rank in a collective
    if world.rank == 0:
        part = Path(f"{task.result}.part")
        part.write_text(json.dumps(row))
        part.replace(task.result)


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def measure(bench: Bench, task: Task) -> Row:
    """The row's own fields. Of the ranks the slowest counts for a step, the largest for memory; of shares the mean."""
    a, config, world = bench.assembly, bench.config, bench.assembly.grid.world
    yardstick = Yardstick(bench, task)
    gemm = comm.gather_objects(gemm_tflops(bench.device, config.precision.dtype, rounds=4), world)
    load = os.getloadavg()[0]
    own = time_steps(bench, task.steps, task.warmup, yardstick.lay)
    series = {
        "step_seconds": own.seconds, "step_cpu_seconds": own.cpu,
        "yardstick_seconds": yardstick.seconds, "yardstick_cpu_seconds": yardstick.cpu,
    }  # fmt: skip
    series = {name: _slowest(comm.gather_objects(values, world)) for name, values in series.items()}
    times = series["step_seconds"]
    waited = statistics.mean(comm.gather_objects(statistics.median(own.waited), world))
    memory = max(comm.gather_objects(peak_memory_bytes(bench.device), world))
    rate = config.train.global_batch_size / statistics.median(times)
    low, high = quartiles(times)
    tflops = a.training_flops * rate / 1e12 / world.size
    peak = peak_tflops(bench.device, config.precision.dtype)
    on_gpu = bench.device.type == "cuda"
    return {
        "grid_p_d_c_t": "x".join(map(str, a.grid.shape.sizes)),
        "global_batch": config.train.global_batch_size,
        "micro_batches": config.num_micro_batches(a.grid.shape),
        "images_per_second": rate,
        "images_per_second_quartiles": [config.train.global_batch_size / t for t in (high, low)],
        "samples": len(times),
        "tflops_per_device": tflops,
        "mfu": tflops / peak if peak else None,
        "mfu_of_measured_gemm": tflops * world.size / sum(gemm),
        "gemm_tflops_per_device": sum(gemm) / world.size,
        "peak_memory_MiB_per_rank": memory / 2**20,
        "communication_share": None if on_gpu else waited,
        **series,
        "environment": _environment(bench, load),
    }


def _environment(bench: Bench, load: float) -> Row:
    """What this rank runs on; of all ranks their hosts and devices. Collective."""
    seen = comm.gather_objects((socket.gethostname(), processor(bench.device)), bench.assembly.grid.world)
    return {
        "version": version(),
        **machine(bench.config, bench.device),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "hosts": sorted({host for host, _ in seen}),
        "devices": sorted({device for _, device in seen}),
        "load_average_at_start": load,
    }


def _slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    return [max(times) for times in zip(*of_ranks, strict=True)]


class Turns:
    """Steps of this program and of another one, by turns: who waits is blocked in a read from a named pipe."""

    def __init__(self, task: Task, rank: int) -> None:
        self._told, self._tell = (os.open(f"{name}.{rank}", os.O_RDWR) for name in task.turns) if task.turns else (0, 0)
        self._ours = not task.first

    def begin(self) -> None:
        """Return when the next step is ours; the one before, if any, was. Who comes second begins with saying so."""
        self.end()
        if self._told:
            os.read(self._told, 1)
        self._ours = True

    def end(self) -> None:
        """The next step is the other's."""
        if self._tell and self._ours:
            os.write(self._tell, b".")
        self._ours = False


class Yardstick:
    """A fixed piece of work that takes turns with the steps: what it takes longer, the machine is slower.

    It is a product and a pass over memory, of torch alone, so no change of this program changes it; all ranks do it at
    once. seconds, cpu: of each time it was laid on, once more than there are steps; wall-clock, and of the CPU.
    """

    def __init__(self, bench: Bench, task: Task) -> None:
        self._turns, self._left = Turns(task, bench.world.rank), task.steps
        on_gpu = bench.device.type == "cuda"
        self._bench, self.seconds, self.cpu = bench, list[float](), list[float]()
        width, self._times, dtype = (8192, 4, torch.bfloat16) if on_gpu else (768, 1, torch.float32)
        self._matrix = torch.full((width, width), 1e-3, device=bench.device, dtype=dtype)
        self._product = torch.empty_like(self._matrix)
        self._long = torch.zeros(2 << 20, device=bench.device)
        for _ in range(2):
            self._work()

    def lay(self) -> None:
        """Pass the turn on after a step, and time the yardstick once the next is ours. Collective."""
        if self._left:
            self._turns.begin()
        self._measure()
        if not self._left:
            self._turns.end()
        self._left -= 1

    def _measure(self) -> None:
        comm.barrier(self._bench.assembly.grid.world)
        cpu = time.process_time()
        self.seconds.append(seconds(self._work, self._bench.device))
        self.cpu.append(time.process_time() - cpu)
        comm.barrier(self._bench.assembly.grid.world)

    def _work(self) -> None:
        for _ in range(self._times):
            torch.mm(self._matrix, self._matrix, out=self._product)
            self._long.add_(1.0)


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], "sweep"))
