"""Lanes between ranks, over all that may carry them: shared memory, gloo, groups of two ranks (as on NCCL)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.comm import barrier
from parallel.failures import MismatchError, PeerLostError
from parallel.grid import Grid, GridShape, make_grid
from parallel.pipeline import lanes
from parallel.pipeline.boundary import Route, Specs, TensorSpec, routes_between_ranks
from parallel.pipeline.host_lanes import SLOTS, HostLane, HostPost
from parallel.pipeline.post import SENDS_IN_FLIGHT, Lane, Post, message_bytes
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
    device, shape = torch.device("cuda") if kind == "NCCL" else CPU, GridShape(pipeline=2, data=world.size // 2)
    grid = make_grid(shape, world, device, shared_memory=kind == "shared memory", timeout=20.0)
    if kind == "pairs":
        routes = routes_between_ranks(PLACES, BOUNDARIES)
        post: Post = lanes.on_pairs(routes, PLACES, grid.pipeline, device, ready=ready)
    else:
        post = lanes.open_post(PLACES, BOUNDARIES, axis=grid.pipeline, device=device, ready=ready)
    assert post.carrier.startswith("gloo, " if kind == "pairs" else kind), post.carrier
    yield grid, post
    post.close()
    grid.close()


def message(lane: Lane, m: int) -> tuple[Tensor, ...]:
    """The only one of its kind."""
    generator = torch.Generator().manual_seed(1000 * lane.route.source + 100 * lane.route.target + m)
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return tuple(torch.randint(-99, 99, x.shape, generator=generator).to(device, x.dtype) for x in lane.specs)


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
    expected = [MANY if lane.specs and PLACES[lane.route.source] != rank else 0 for lane in post.lanes.values()]
    assert [lane.num_expected for lane in post.lanes.values()] == expected
    for lane in post.lanes.values():
        for m in range(MANY):
            if PLACES[lane.route.source] != rank:
                check(lane, m)
        assert lane.num_expected == 0 or PLACES[lane.route.source] == rank
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
            elif kind not in ("pairs", "NCCL"):
                one_after_the_other(post, rank)
            meter = grid.meter
            assert meter.bytes["send"] > 0 and meter.calls["send"] > 0 and meter.calls["recv"] > 0


@pytest.mark.parametrize(("kind", "ranks"), [("shared memory", 2), ("gloo", 2), ("pairs", 4)])
def test_messages_arrive(kind: str, ranks: int) -> None:
    """Groups of two are made by all ranks of the world, those of two pipelines."""
    run_ranks(ranks, carry, kind)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_messages_arrive_over_nccl() -> None:
    run_ranks(2, carry, "NCCL", kind="cuda", timeout=120.0)


def outline(world: World, *, shared: bool, ready: bool = False, specs: Specs = SPECS) -> tuple[Grid, Post, Lane]:
    """Two stages; the lane from rank 0 to rank 1."""
    grid = make_grid(GridShape(pipeline=2), world, shared_memory=shared, timeout=3.0)
    post = lanes.open_post((0, 1), ((), specs), axis=grid.pipeline, device=CPU, ready=ready)
    return grid, post, post.lanes[Route(0, 1)]


def opened_once(world: World) -> None:
    grid, post, _ = outline(world, shared=True)
    here, there = ((), SPECS), ((), SPECS[:1])
    again = lanes.open_post((0, 1), here, axis=grid.pipeline, device=CPU)
    ready = lanes.open_post((0, 1), here, axis=grid.pipeline, device=CPU, ready=True)
    assert again is post and ready is not post and (post.bounded, ready.bounded) == (True, False)
    assert lanes.open_post((0, 1), here, axis=grid.pipeline, device=CPU) is ready  # it serves both
    assert post.nbytes > SLOTS * message_bytes(SPECS[: 2 + 2 * world.rank])  # of what it receives
    with pytest.raises(MismatchError, match=r"ranks 0 and 1 of the pipeline axis \(0, 1\) have different stages"):
        lanes.open_post((0, 1), there if world.rank else here, axis=grid.pipeline, device=torch.device("cpu", 0))
    grid.close()


def crossed(world: World) -> None:
    """Rank 1 expects another micro-batch than comes."""
    for shared in (True, False):
        grid, post, lane = outline(world, shared=shared)
        if world.rank == 0:
            lane.send(5, message(lane, 5))
            post.finish()
        else:
            lane.expect(4)
            with pytest.raises(MismatchError, match=r"outputs of stage 0.* micro-batch 4.* rank 0 has sent .*-batch 5"):
                lane.take()
        barrier(grid.pipeline)
        grid.close()


def counts_go_round(world: World) -> None:
    grid, post, lane = outline(world, shared=True)
    assert isinstance(lane, HostLane)
    lane.count = lane.sent.value = lane.taken.value = 2**32 - 3
    barrier(grid.pipeline)
    for m in range(MANY):
        lane.expect(m) if world.rank else lane.send(m, message(lane, m))
    for m in range(MANY if world.rank else 0):
        check(lane, m)
    post.finish()
    grid.close()


def behind(world: World) -> None:
    """Rank 1 comes late: rank 0 is held up if its post is bounded, and not otherwise."""
    for shared in (True, False):
        for ready in (True, False):
            grid, post, lane = outline(world, shared=shared, ready=ready)
            barrier(grid.pipeline)
            start = time.monotonic()
            if world.rank == 0:
                for m in range(MANY):
                    lane.send(m, message(lane, m))
                assert ready or time.monotonic() - start > 0.3, shared
            if ready:
                barrier(grid.pipeline)  # all is sent
            if world.rank == 1:
                time.sleep(0 if ready else 0.4)
                for m in range(MANY):
                    lane.expect(m)
                    check(lane, m)
            post.finish()
            grid.close()


def in_a_collective(world: World) -> None:
    """The sender waits there for who waits for what did not find room."""
    for shared in (True, False):
        grid, post, lane = outline(world, shared=shared, ready=True)
        for m in range(MANY):
            lane.expect(m) if world.rank else lane.send(m, message(lane, m))
        for m in range(MANY if world.rank else 0):
            check(lane, m)
        barrier(grid.pipeline)
        post.finish()
        grid.close()


def on_a_group_of_their_own(world: World) -> None:
    """As where the axis's own group is NCCL's."""
    lanes.is_on_host = lambda axis: False  # type: ignore[attr-defined]
    for shared in (True, False):
        grid, post, _ = outline(world, shared=shared)
        assert post.carrier == ("shared memory" if shared else "gloo")
        for m in range(3):
            for route, lane in post.lanes.items():
                lane.send(m, message(lane, m)) if route.source == world.rank else lane.expect(m)
            for route, lane in post.lanes.items():
                if route.source != world.rank:
                    check(lane, m)
        post.finish()
        grid.close()


def many(world: World) -> None:
    for each in (opened_once, crossed, counts_go_round, behind, in_a_collective, on_a_group_of_their_own):
        each(world)


def test_what_lanes_keep_to() -> None:
    run_ranks(2, many)


def deserted(world: World) -> list[tuple[str, float]]:
    """Of rank 0, whose peer is a process that ends in a moment: what it is told, and after how long."""
    _, post, lane = outline(world, shared=True, ready=True)
    back, told = post.lanes[Route(1, 0)], []
    assert isinstance(post, HostPost)

    def fill() -> None:
        for m in range(MANY):
            lane.send(m, message(lane, m))
        post.finish()

    for wait in (back.take, lambda: post.wait_any([back]), fill) if world.rank == 0 else ():
        gone = os.fork()
        if not gone:
            time.sleep(0.2)
            os._exit(0)
        post.memory.pids = (os.getpid(), gone)
        start = time.monotonic()
        back.expect(0)
        with pytest.raises(PeerLostError) as error:
            wait()
        told.append((str(error.value), time.monotonic() - start))
    if world.rank == 0:
        post.memory.pids, post.memory.timeout = (os.getpid(), os.getppid()), 0.6
        with pytest.raises(PeerLostError, match=r"recv along the pipeline axis .* did not come within 0\.6 seconds"):
            back.take()
    return told


def test_a_rank_that_ends_or_is_late_is_noticed() -> None:
    for n, (told, seconds) in enumerate(run_ranks(2, deserted)[0]):
        kind = "recv" if n < 2 else "send"
        assert f"{kind} along the pipeline axis (0, 1) failed: rank 1 of the axis" in told and "has ended" in told
        assert seconds < 2.5
