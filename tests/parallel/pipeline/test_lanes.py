"""Lanes between ranks, over all that may carry them: shared memory, gloo, groups of two ranks (as on NCCL)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.grid import Grid, GridShape, make_grid
from parallel.pipeline import lanes
from parallel.pipeline.boundary import Route, TensorSpec, routes_between_ranks
from parallel.pipeline.host_lanes import SLOTS
from parallel.pipeline.post import SENDS_IN_FLIGHT, Lane, Post
from parallel.process_group import World
from tests.distributed import run_ranks

CPU = torch.device("cpu")
# Four stages in turn on two ranks; what flows has several types, an odd size, an empty tensor, a part without gradient.
PLACES = (0, 1, 0, 1)
SPECS = (
    TensorSpec((3, 5)),
    TensorSpec((7,), torch.int64, carries_gradient=False),
    TensorSpec((0, 4)),
    TensorSpec((2, 3), torch.bfloat16),
)
BOUNDARIES = ((), SPECS, SPECS, (TensorSpec((2,), torch.int64, carries_gradient=False),))
MANY = SLOTS + SENDS_IN_FLIGHT + 3


def opened(world: World, kind: str, *, ready: bool) -> Iterator[tuple[Grid, Post]]:
    """The lanes, carried by `kind`."""
    size = max(world.size // len(set(PLACES)), 1)
    grid = make_grid(GridShape(pipeline=2, data=size), world, shared_memory=kind == "shared memory", timeout=20.0)
    if kind == "pairs":
        routes = routes_between_ranks(PLACES, BOUNDARIES)
        post: Post = lanes.on_pairs(routes, PLACES, grid.pipeline, CPU, ready=ready)
    else:
        post = lanes.open_post(PLACES, BOUNDARIES, axis=grid.pipeline, device=CPU, ready=ready)
    assert post.carrier.startswith("gloo, " if kind == "pairs" else kind), post.carrier
    yield grid, post
    post.close()
    grid.close()


def message(lane: Lane, m: int) -> tuple[Tensor, ...]:
    """The only one of its kind."""
    generator = torch.Generator().manual_seed(1000 * lane.route.source + 100 * lane.route.target + m)
    return tuple(torch.randint(-99, 99, spec.shape, generator=generator).to(spec.dtype) for spec in lane.specs)


def check(lane: Lane, m: int) -> None:
    taken = lane.take()
    assert [x.dtype for x in taken] == [spec.dtype for spec in lane.specs]
    assert all(torch.equal(x, y) for x, y in zip(taken, message(lane, m), strict=True)), (lane.route, m)


def in_turn(post: Post, rank: int) -> None:
    """As in a schedule: what both send at one time goes together, many times over."""
    ours = [lane for route, lane in post.lanes.items() if PLACES[route.source] == rank]
    theirs = [lane for lane in post.lanes.values() if lane not in ours]
    for m in range(3 * MANY):
        post.start([(lane, m, message(lane, m)) for lane in ours], [(lane, m) for lane in theirs])
        for lane in theirs:
            check(lane, m)
    post.finish()


def one_after_the_other(post: Post, rank: int) -> None:
    """One rank is ahead as far as it may be, then the other."""
    for source in range(2):
        for route, lane in post.lanes.items():
            if PLACES[route.source] == source == rank:
                for m in range(MANY):
                    lane.send(m, message(lane, m))
            elif PLACES[route.source] == source:
                for m in range(MANY):
                    lane.expect(m)
                for m in range(MANY):
                    check(lane, m)
    post.finish()


def both_are_full(post: Post, rank: int) -> None:
    """Neither takes before all is sent."""
    for lane in post.lanes.values():
        for m in range(MANY):
            if PLACES[lane.route.source] == rank:
                lane.send(m, message(lane, m))
            else:
                lane.expect(m)
    for lane in post.lanes.values():
        for m in range(MANY):
            if PLACES[lane.route.source] != rank:
                check(lane, m)
    post.finish()


def whichever_comes_first(post: Post, rank: int) -> None:
    """Rank 1 is told by which lanes messages have come, in an order that it does not know."""
    first, second, go = post.lanes[Route(0, 1)], post.lanes[Route(2, 3)], post.lanes[Route(1, 0)]
    for m in range(4):
        order = [first, second] if m % 2 else [second, first]
        waiting = [first, second]
        for lane in waiting if rank else ():
            lane.expect(m)
        for lane in order:
            if rank == 0:
                go.expect(m)
                go.take()
                lane.send(m, message(lane, m))
                continue
            assert not any(lane.has_arrived() for lane in waiting)
            go.send(m, message(go, m))
            post.wait_any(waiting)
            assert [x for x in waiting if x.has_arrived()] == [lane]
            check(lane, m)
            waiting.remove(lane)
    post.finish()
    assert post.lanes[Route(3, 2)].has_arrived()  # no tensors
    assert post.lanes[Route(3, 2)].take() == ()


def carry(world: World, kind: str) -> None:
    for ready in (False, True):
        for grid, post in opened(world, kind, ready=ready):
            rank = grid.pipeline.index
            in_turn(post, rank)
            in_turn(post, rank)
            if ready:
                one_after_the_other(post, rank)
                both_are_full(post, rank)
                whichever_comes_first(post, rank)
            elif kind != "pairs":
                one_after_the_other(post, rank)
            meter = grid.meter
            assert meter.bytes["send"] > 0 and meter.calls["send"] > 0 and meter.calls["recv"] > 0


@pytest.mark.parametrize("kind", ["shared memory", "gloo", "pairs"])
def test_messages_arrive(kind: str) -> None:
    run_ranks(2, carry, kind)
