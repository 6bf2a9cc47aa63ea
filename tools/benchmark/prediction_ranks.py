"""A rank of a run that `python -m tools.benchmark predictions` measures.

`python -m tools.benchmark.prediction_ranks SOCKET`, started by tools.benchmark.turns. What is asked is what the rank
holds beside what any rank does: code that was read from disk, threads, scratch memory of libraries, sockets. So a tiny
model of the same kind and layout takes a step first, and is given up; what is resident then is the ground, and the peak
above it, as the kernel counts it, is the measurement: the kernel's count is what ends a process that takes too much.

Tensors come from the run's own allocator. Times are taken in another process, which does as a run does from its start.
Processors are not equally fast from minute to minute (heat, neighbours of a virtual machine): a product that a cluster
file has the time of is taken before and after each step, by all ranks at once, and says how fast they were then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch

from data import DataConfig
from engine.assemble import assemble, grid_of
from engine.config import Config
from engine.device import choose_device, memory_share, prepare_cpu, set_matmul
from engine.plan import LiveBytes, states
from engine.recompute_choice import settled
from engine.run.step import Stepper
from parallel import comm, process_group
from parallel.grid import Grid
from parallel.process_group import read_world
from tools.benchmark.bench import read_config, stream_of
from tools.benchmark.resident import give_back, resident_bytes

_DATA = DataConfig(kind="synthetic", size=8)
_CPU = torch.device("cpu")
PROBE = (1024, 512, 512)
"""Rows, input and output width of the product, one of those that `tools.plan --measure` times."""


def measure_memory(flags: Sequence[str], tiny: Sequence[str]) -> dict[str, Any]:
    """Bytes. Collective.

    Args:
        flags: of the configuration. tiny: flags that make it small.
    """
    prepare_cpu(read_world())
    config, grid = _start(flags)
    _steps(Stepper(assemble(_read([*flags, *tiny]).resolve(grid.world.size), grid, _CPU)), 1)
    ground, shared = _ground(grid), resident_bytes("RssShmem")
    stepper = Stepper(assemble(config, grid, _CPU))
    _steps(stepper, 2)
    peak, shared = resident_bytes("VmHWM"), resident_bytes("RssShmem") - shared
    tensors = _live_tensors(stepper)
    return {"peak_bytes": peak - ground, "shared_bytes": shared, "tensor_bytes": tensors, **_chosen(config)}


def measure_time(flags: Sequence[str], steps: int) -> dict[str, Any]:
    """Seconds of `steps` steps after one more, CPU seconds of them, and of the probe before and after. Collective."""
    prepare_cpu(read_world())
    config, grid = _start(flags)
    probes, probe = list[float](), partial(torch.nn.functional.linear, *(torch.randn(n, PROBE[1]) for n in PROBE[::2]))
    found = _steps(Stepper(assemble(config, grid, _CPU)), 1 + steps, lambda: probes.append(_seconds_of(probe)))[1:]
    return {
        "seconds": [wall for wall, _ in found],
        "cpu_seconds": [cpu for _, cpu in found],
        "probe_seconds": [(before + after) / 2 for before, after in pairwise(probes[1:])],
        **_chosen(config),
    }


def _seconds_of(probe: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds, which more ranks than cores do not change, of one thread."""
    probe()
    start = time.thread_time()
    for _ in range(repeats):
        probe()
    return (time.thread_time() - start) / repeats


def _read(flags: Sequence[str]) -> Config:
    return replace(read_config(flags), data=_DATA)


def _start(flags: Sequence[str]) -> tuple[Config, Grid]:
    """What a run does before it builds the model; with policy auto, it chooses save sets then."""
    world = read_world()
    config = _read(flags).resolve(world.size)
    device = choose_device("cpu", world)
    set_matmul(config.precision, device)
    process_group.start(world, device, config.parallel.timeout)
    grid = grid_of(config, world, device)
    return settled(config, grid, device, memory_share(device, world))[0], grid


def _chosen(config: Config) -> dict[str, Any]:
    """What policy auto has found: the save sets of the run, whether it recomputes ahead, its cut into stages."""
    policy, counts = config.recompute.policy, config.parallel.layers_per_stage
    return {
        "policy": policy if isinstance(policy, str) else list(policy),
        "ahead": config.recompute.ahead,
        "layers_per_stage": counts and list(counts),
    }


def _ground(grid: Grid) -> int:
    """What is resident when all that is free was given back; the peak begins here. Collective."""
    comm.barrier(grid.world)
    found = give_back()
    comm.barrier(grid.world)
    return found


def _steps(stepper: Stepper, count: int, between: Callable[[], object] = lambda: None) -> list[tuple[float, float]]:
    """Seconds of steps, by the wall and of CPU, with micro-batches that are read while they go on, as in a run.
    Collective.

    Args:
        between: what is done before each step and after the last, by all ranks at once.
    """
    found, world = list[tuple[float, float]](), stepper.assembly.grid.world
    for batches in islice(stream_of(stepper.assembly).steps(0), count):
        comm.barrier(world)
        between()
        comm.barrier(world)
        start = time.perf_counter(), time.process_time()
        stepper.train_step(batches, 1e-4)
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    comm.barrier(world)
    between()
    return found


def _live_tensors(stepper: Stepper) -> int:
    """The most bytes that live tensors take, counted while a step makes them."""
    with LiveBytes() as counter:
        _steps(stepper, 1)
    return sum(states(stepper.assembly).values()) + counter.peak


def serve(socket: Connection) -> None:
    """Say when it is ready, then answer one message with what was measured: bytes, unless its task has `steps`."""
    task = socket.recv()
    socket.send({"ready": True})
    try:
        socket.recv()
    except EOFError:
        return
    socket.send((measure_time if "steps" in task else measure_memory)(**task))
    socket.close()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    process_group.stop()
