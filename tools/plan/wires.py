"""What links between ranks reach, as the engine moves data: latency and rate of collectives and messages."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from parallel import comm
from parallel.comm import Axis
from parallel.grid import GridShape, make_grid
from parallel.pipeline.boundary import TensorSpec
from parallel.pipeline.lanes import open_post
from parallel.process_group import World
from tools.benchmark.messages import round_trip

_SMALL, _BIG = 1 << 10, 1 << 21  # fp32 numbers that a rank hands over


def measure_links(world: World, device: torch.device, rounds: int) -> dict[str, Any]:
    """`within_node`, and on a CPU `between_nodes` over gloo; nothing of a single rank. Collective."""
    if world.size == 1:
        return {}
    found = {"within_node": _links(world, device, rounds, shared=True)}
    if device.type == "cpu":
        found["between_nodes"] = _links(world, device, rounds, shared=False)
    return found


def _links(world: World, device: torch.device, rounds: int, *, shared: bool) -> dict[str, Any]:
    grid = make_grid(GridShape(data=world.size), world, device, shared_memory=shared)
    axis, size = grid.data, world.size

    def each(count: int) -> dict[str, Callable[[], object]]:
        x = torch.zeros(count, device=device)
        parts = [count // size] * size
        whole = torch.zeros(sum(parts), device=device)
        return {
            "all_reduce": lambda: comm.all_reduce(x, axis),
            "all_gather": lambda: comm.all_gather_rows(x, axis),
            "reduce_scatter": lambda: comm.reduce_scatter_rows(whole, axis),
            "all_to_all": lambda: comm.all_to_all_rows(whole, parts, parts, axis),
        }

    small, big = (_medians(each(count), axis, rounds) for count in (_SMALL, _BIG))
    hops, links = math.ceil(math.log2(size)), dict[str, Any]()
    for kind, latency in small.items():
        factor = {"all_gather": size, "all_reduce": 2, "reduce_scatter": 1, "all_to_all": 1}[kind] / size
        sent = 4 * _BIG * factor * (size - 1)
        links[kind] = _link(latency / hops, sent, big[kind] - latency)
    grid.close()
    links["message"] = _message(world, device, rounds, shared=shared)
    return {**links, "overlap": 0.8 if device.type == "cuda" else 0.0}


def _link(latency: float, sent: float, seconds: float) -> dict[str, float]:
    return {"latency_us": 1e6 * latency, "gb_per_second": sent / max(seconds, 1e-9) / 1e9}


def _medians(calls: dict[str, Callable[[], object]], axis: Axis, rounds: int) -> dict[str, float]:
    """Of all rounds of all ranks, the same on each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3 * rounds + 2):
        for name, call in calls.items():
            comm.barrier(axis)
            start = time.perf_counter()
            call()
            if axis.group is not None and comm.device_of(axis).type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    own = {name: statistics.median(of[2:]) for name, of in times.items()}
    every = comm.gather_objects(own, axis)
    return {name: statistics.median(of[name] for of in every) for name in calls}


def _message(world: World, device: torch.device, rounds: int, *, shared: bool) -> dict[str, float]:
    """Between two neighbours, by the pipeline's lanes."""
    grid = make_grid(GridShape(pipeline=world.size), world, device, shared_memory=shared)
    axis, found = grid.pipeline, list[float]()
    for count in (_SMALL, _BIG):
        boundaries = ((), (TensorSpec((count,)),))
        post = open_post((0, 1), boundaries, axis=axis, device=device, ready=False)
        times = []
        for _ in range(3 * rounds + 2):
            comm.barrier(axis)
            if axis.index < 2:
                times.append(round_trip(post, axis) / 2)
        own = statistics.median(times[2:]) if times else 0.0
        found.append(comm.gather_objects(own, axis)[0])
    grid.close()
    return _link(found[0], 4 * _BIG, found[1] - found[0])
