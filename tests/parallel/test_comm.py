"""Collectives against plain arithmetic, what the meter counts, lost peers, and how launchers name ranks."""

import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import comm, process_group
from parallel.comm import Axis, CommMeter, single_axis
from parallel.failures import PeerLostError, is_lost_peer
from parallel.grid import GridShape, make_grid
from parallel.messages import exchange_start
from parallel.process_group import World
from tests.distributed import run_ranks


def _numbers(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose sums are exact in every dtype."""
    return torch.randint(-9, 10, (rows, 3), generator=torch.Generator().manual_seed(rank)).to(dtype)


def _check_reductions(axis: Axis, parts: list[Tensor], strided: bool) -> None:
    mine = parts[axis.index]
    neighbours = torch.full_like(mine, 77)
    wide = torch.stack([mine, neighbours], 1)
    x = wide[:, 0] if strided else mine.clone()
    assert x.is_contiguous() is not strided
    stacked, rows = torch.stack(parts), mine.shape[0] // axis.size
    own = slice(axis.index * rows, (axis.index + 1) * rows)
    assert torch.equal(comm.all_gather_rows(x, axis), torch.cat(parts))
    assert torch.equal(comm.reduce_scatter_rows(x, axis), stacked.sum(0)[own])
    assert torch.equal(x, mine)
    for op, expected in {"max": stacked.amax(0), "min": stacked.amin(0), "sum": stacked.sum(0)}.items():
        source = x if strided else x.clone()
        result = comm.all_reduce(source, axis, op)
        assert torch.equal(result, expected), op
        assert (result.data_ptr() == source.data_ptr()) is not strided  # in place where it is safe
    assert torch.equal(wide, torch.stack([mine, neighbours], 1))


def _check_messages(axis: Axis, parts: list[Tensor]) -> None:
    """Two messages at once to the next rank of a ring, one of them transposed."""
    before, after = (axis.index - 1) % axis.size, (axis.index + 1) % axis.size
    mine, theirs = parts[axis.index], parts[before]
    arriving = [torch.empty_like(t) for t in (theirs, theirs.t().contiguous())]
    leaving = [mine, mine.t().contiguous()]
    exchange_start([(t, after) for t in leaving], [(t, before) for t in arriving], axis).wait()
    assert torch.equal(arriving[0], theirs)
    assert torch.equal(arriving[1], theirs.t())


def _check_sums_into_place(axis: Axis) -> None:
    """Shards of fp32 sums, whatever is sent; written over or added when waited for, and not before."""
    rows = 4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parts = [_numbers(rank, rows * axis.size, dtype)[:, 0].contiguous() for rank in range(axis.size)]
        own = slice(axis.index * rows, (axis.index + 1) * rows)
        expected = torch.stack(parts).float().sum(0)[own]
        whole = torch.full((rows + 2,), 5.0)  # the sum goes into the middle of something else
        out = whole[1:-1]
        for accumulate, result in ((False, expected), (True, 2 * expected), (False, expected)):
            x, room, before = parts[axis.index].clone(), torch.empty_like(parts[0]), out.clone()
            pending = comm.reduce_scatter_into_start(out, x, room, axis, accumulate=accumulate)
            assert torch.equal(out, before)
            assert pending.wait() is out and torch.equal(out, result)
            pending.wait()  # adds nothing
            assert torch.equal(out, result) and whole[0] == whole[-1] == 5
            assert torch.equal(x, parts[axis.index])
        x, room = parts[axis.index].float(), torch.empty(rows * axis.size)  # in the place of what is sent
        assert torch.equal(comm.reduce_scatter_into_start(x[own], x, room, axis).wait(), expected)
        assert torch.equal(x[own], expected)
    first = 1.0 if axis.index == 0 else 2.0**-9  # in bf16 the sum would be 1
    x = torch.full((2 * axis.size,), first, dtype=torch.bfloat16)
    out = torch.zeros(2)
    comm.reduce_scatter_into_start(out, x, torch.empty_like(x), axis).wait()
    assert torch.equal(out, torch.full((2,), 1 + (axis.size - 1) * 2.0**-9))
    big = 2.0**24 if axis.index == 0 else 1.0  # each 1 is lost beside it, but not if they were added up before
    x = torch.full((2 * axis.size,), big)
    comm.reduce_scatter_into_start(out, x, torch.empty_like(x), axis).wait()
    in_order = torch.full((2,), 2.0**24)
    for _ in range(axis.size - 1):
        in_order += 1.0
    assert torch.equal(out, in_order)
    gathered = torch.empty(2 * axis.size)
    pending = comm.all_gather_into_start(gathered, torch.full((2,), float(axis.index)), axis)
    assert pending.wait() is gathered
    assert gathered.tolist() == [float(rank) for rank in range(axis.size) for _ in range(2)]


def _collectives(world: World) -> None:
    grid = make_grid(GridShape(tensor=world.size), world)
    axis = grid.tensor
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        parts = [_numbers(rank, 2 * world.size, dtype) for rank in range(world.size)]
        for strided in (False, True):
            _check_reductions(axis, parts, strided)
        _check_messages(axis, parts)
        last = world.size - 1
        assert torch.equal(comm.broadcast(parts[world.rank].clone(), axis, last), parts[last])
    _check_sums_into_place(axis)
    assert comm.gather_objects({"rank": world.rank}, axis) == [{"rank": rank} for rank in range(world.size)]
    assert comm.least(7.0 - world.rank, axis) == 8.0 - world.size
    comm.barrier(axis)


def _metering(world: World) -> None:
    grid = make_grid(GridShape(tensor=world.size), world)
    axis, meter = grid.tensor, grid.meter
    x = torch.ones(2 * world.size, 3)
    pending = comm.reduce_scatter_rows_start(x, axis)
    result = pending.wait()
    assert pending.wait() is result and pending.is_done()  # the sum after the exchange is taken once
    for _ in range(3):
        comm.all_reduce(x.clone(), axis)
    comm.all_gather_rows(x.bfloat16(), axis)
    assert dict(meter.calls) == {"reduce_scatter": 1, "all_reduce": 3, "all_gather": 1}
    assert dict(meter.bytes) == {
        "reduce_scatter": 4 * x.numel(),
        "all_reduce": 12 * x.numel(),
        "all_gather": 2 * x.numel(),
    }
    assert set(meter.seconds) == set(meter.calls) and meter.total_seconds > 0
    meter.reset()
    assert not meter.calls and not meter.bytes and meter.total_seconds == 0


def _all_of_it(world: World) -> list[bool]:
    _collectives(world)
    _metering(world)
    return [process_group.first_to_report(kind, world) for kind in ("nan", "peer")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives(ranks: int) -> None:
    reports = run_ranks(ranks, _all_of_it)
    assert [sum(column) for column in zip(*reports, strict=True)] == [1, 1]  # one rank speaks for all, per kind


def test_an_axis_of_one_rank_is_free() -> None:
    axis, x = single_axis("tensor"), torch.ones(4, 2).t()
    assert comm.all_reduce(x, axis) is x
    assert comm.all_gather_rows(x, axis) is x
    assert comm.reduce_scatter_rows(x, axis) is x
    assert comm.broadcast(x, axis) is x
    assert comm.all_to_all_rows(x, [2], [2], axis) is x
    assert comm.all_reduce_start(x, axis).is_done()
    out = torch.empty(2, 4)
    assert comm.all_gather_into_start(out, x, axis).wait() is out and torch.equal(out, x)
    assert comm.gather_objects("a", axis) == ["a"]
    comm.barrier(axis)
    assert axis.meter == CommMeter()
    assert not dist.is_initialized()


def test_along_a_planned_axis_shapes_are_right_and_calls_are_counted() -> None:
    axis, x = Axis(name="data", ranks=(0, 1, 2), index=1, planned=True), torch.ones(6, 2, device="meta")
    assert comm.all_reduce(x, axis).shape == (6, 2)
    assert comm.all_gather_rows(x, axis).shape == (18, 2)
    assert comm.reduce_scatter_rows(x, axis).shape == (2, 2)
    assert comm.all_gather_into_start(x, x[:2], axis).wait() is x
    out, flat = torch.zeros(2, device="meta"), torch.ones(6, device="meta")
    for accumulate in (False, True):
        room = torch.empty(2, device="meta")
        assert comm.reduce_scatter_into_start(out, flat, room, axis, accumulate=accumulate).wait() is out
    assert axis.meter.calls == {"all_reduce": 1, "all_gather": 2, "reduce_scatter": 3}  # as they would be made
    assert not dist.is_initialized()


def _wait_for_nobody(world: World) -> float:
    """Rank 1 never comes; rank 0 allows it one second."""
    ranks = (0, 1)
    group = dist.new_group(list(ranks), timeout=timedelta(seconds=1))
    dist.barrier()
    if world.rank == 1:
        time.sleep(2)
        return 0.0
    axis, start = Axis(name="data", ranks=ranks, index=0, group=group), time.monotonic()
    with pytest.raises(PeerLostError, match=r"all_reduce along the data axis \(0, 1\) failed"):
        comm.all_reduce(torch.ones(2), axis)
    with pytest.raises(PeerLostError, match=r"recv along the data axis"):
        exchange_start([], [(torch.ones(2), 1)], axis).wait()
    return time.monotonic() - start


def test_a_peer_that_never_comes_is_an_error_in_time() -> None:
    assert run_ranks(2, _wait_for_nobody, timeout=60)[0] < 20


def _wait_for_the_departed(world: World) -> None:
    axis = make_grid(GridShape(data=2), world).data
    comm.barrier(axis)
    if world.rank == 0:
        with pytest.raises(PeerLostError, match="data axis"):
            comm.all_reduce(torch.ones(2), axis)


def test_a_peer_that_left_is_an_error_at_once() -> None:
    start = time.monotonic()
    run_ranks(2, _wait_for_the_departed, timeout=60)
    assert time.monotonic() - start < 50  # long before the group's own time-out


def _interrupted(world: World) -> list[str]:
    """Something that is no lost peer is raised while rank 0 waits, through shared memory and through gloo."""
    found = []

    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    for shared in (True, False):
        axis = make_grid(GridShape(data=2), world, shared_memory=shared).data
        comm.barrier(axis)
        if world.rank == 0:
            signal.signal(signal.SIGALRM, killed)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        else:
            time.sleep(0.5)
        try:
            comm.all_reduce(torch.ones(2), axis)
        except RuntimeError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_is_raised_while_others_are_waited_for_is_not_taken_for_a_lost_peer() -> None:
    assert run_ranks(2, _interrupted)[0] == ["RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed."] * 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (PeerLostError("rank 1 has ended"), True),
        (RuntimeError("[/w/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1."), True),
        (RuntimeError("[/w/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[enforce fail at /w/gloo/gloo/transport/tcp/pair.cc:446] op.nbytes. 40 vs 4000"), False),
        (dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed"), True),
        (dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout"), True),
        (dist.DistBackendError("NCCL error in: x.cpp:1\nncclInvalidUsage: This usually reflects"), False),
        (dist.DistNetworkError("the connection to the store was reset"), True),
        (RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 1 (expected (3), got (2))"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
    ids=lambda value: str(value).partition("\n")[0][:40],
)
def test_who_is_to_blame(error: RuntimeError, lost: bool) -> None:
    assert is_lost_peer(error) is lost
