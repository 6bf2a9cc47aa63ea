"""A pipeline's messages between two ranks: through shared memory and over gloo, in the order of a schedule and by what
is ready.

The round trip is of a message that each end waits for. Of one that goes one way while both ends compute, what counts is
how long it keeps the sender, and then the receiver, who computes until it is there. `cpu_us` is the processor time of
both ends of a message, all their threads, where nobody waits: several are sent, and then, when they are there, taken,
less what the same takes with none.

    python -m tools.launch --nproc-per-node 2 -m tools.benchmark messages
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from engine.device import prepare_cpu
from parallel import comm, process_group
from parallel.comm import Axis
from parallel.grid import GridShape, make_grid
from parallel.pipeline.boundary import Route, TensorSpec
from parallel.pipeline.lanes import open_post
from parallel.pipeline.post import Lane, Post
from parallel.process_group import World
from tools.benchmark.table import show
from tools.options import add_json

_BYTES = (64, 64 << 10, 4 << 20)
_COMPUTES_SECONDS = 0.01
_TOGETHER = 4  # as many as shared memory has room for


def main(argv: Sequence[str], world: World) -> int | None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tools.benchmark messages", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    add_json(parser)
    options = parser.parse_args(argv)
    if world.size != 2:
        parser.error(f"{world.size} ranks: messages go between 2")
    prepare_cpu(world)
    process_group.start(world, torch.device("cpu"), 600.0)
    rows = [row for shared in (True, False) for row in _over(world, options.rounds, shared=shared)]
    if world.rank == 0:
        show(rows, options.json)
    process_group.stop()
    return None


def _over(world: World, rounds: int, *, shared: bool) -> Iterator[dict[str, object]]:
    axis = make_grid(GridShape(pipeline=2), world, shared_memory=shared).pipeline
    for ready in (False, True):
        for nbytes in _BYTES:
            boundaries = ((), (TensorSpec((nbytes // 4,)),))
            post = open_post((0, 1), boundaries, axis=axis, device=torch.device("cpu"), ready=ready)
            trips = _repeat(rounds, round_trip, post, axis)
            ways = _repeat(rounds, _one_way, post, axis)
            send, take = comm.gather_objects(statistics.median(ways), axis)
            several, none = (_repeat(rounds, partial(_processor_time, count), post, axis) for count in (_TOGETHER, 0))
            own = (statistics.median(several) - statistics.median(none)) / _TOGETHER
            used = sum(comm.gather_objects(own, axis))
            yield {
                "carrier": post.carrier, "policy": "ready" if ready else "static", "bytes": nbytes,
                "round_trip_us": 1e6 * statistics.median(trips), "send_us": 1e6 * send, "take_us": 1e6 * take,
                "cpu_us": 1e6 * used,
            }  # fmt: skip


def _repeat(rounds: int, measure: Callable[[Post, Axis], float], post: Post, axis: Axis) -> list[float]:
    measured = []
    for _ in range(rounds + 3):
        comm.barrier(axis)
        measured.append(measure(post, axis))
    return measured[3:]


def _lanes(post: Post, axis: Axis) -> tuple[Lane, Lane]:
    """(to the other rank, from there)."""
    there, back = Route(0, 1), Route(1, 0)
    return (post.lanes[there], post.lanes[back]) if axis.index == 0 else (post.lanes[back], post.lanes[there])


def round_trip(post: Post, axis: Axis) -> float:
    """Seconds until a message that goes to the other rank and back is there."""
    there, back = _lanes(post, axis)
    message = tuple(torch.zeros(spec.shape) for spec in there.specs)
    start = time.perf_counter()
    back.expect(0)
    if axis.index == 0:
        there.send(0, message)
    arrived = back.take()
    if axis.index == 1:
        there.send(0, arrived)
    post.finish()
    return time.perf_counter() - start


def _one_way(post: Post, axis: Axis) -> float:
    """Seconds that this end is kept."""
    there, back = _lanes(post, axis)
    message = tuple(torch.zeros(spec.shape) for spec in there.specs)
    kept, start = 0.0, time.perf_counter()
    if axis.index == 0:
        there.send(0, message)
    else:
        back.expect(0)
    kept += time.perf_counter() - start
    _compute()
    start = time.perf_counter()
    if axis.index == 1:
        back.take()
    post.finish()
    return kept + time.perf_counter() - start


def _processor_time(count: int, post: Post, axis: Axis) -> float:
    """Of this end, for so many messages."""
    there, back = _lanes(post, axis)
    message = tuple(torch.zeros(spec.shape) for spec in there.specs)
    used = -time.process_time()
    for number in range(count):
        if axis.index == 0:
            there.send(number, message)
        else:
            back.expect(number)
    time.sleep(_COMPUTES_SECONDS)  # the threads that carry them may go on
    if axis.index == 1:
        for _ in range(count):
            back.take()
    post.finish()
    return used + time.process_time()


def _compute() -> None:
    x, until = torch.ones(64, 64), time.perf_counter() + _COMPUTES_SECONDS
    while time.perf_counter() < until:
        x @ x
