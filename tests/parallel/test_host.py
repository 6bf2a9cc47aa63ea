"""Shared memory between ranks of a host: the same results as gloo's, nobody waits for ever, and counters go round."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel import comm, host
from parallel.comm import Axis
from parallel.failures import MismatchError, PeerLostError
from parallel.grid import GridShape, make_grid
from parallel.host_channel import SLOT_BYTES, SLOTS
from parallel.process_group import World
from tests.distributed import run_ranks

FLOATS = SLOT_BYTES // 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def axes(world: World, timeout: float = 30.0) -> tuple[Axis, Axis]:
    """Over shared memory, and over gloo."""
    shape = GridShape(data=world.size)
    shared = make_grid(shape, world, timeout=timeout).data
    assert shared.channel is not None
    return shared, make_grid(shape, world, shared_memory=False).data


def numbers(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, so that sums are exact in any type and any order."""
    return torch.randint(-8, 8, (count,), generator=torch.Generator().manual_seed(rank)).to(dtype)


def collectives(x: Tensor, axis: Axis) -> dict[str, Tensor]:
    rows = x.shape[0] // axis.size
    summed, added = torch.zeros(rows), torch.ones(rows)
    results = {
        "gather": comm.all_gather_rows(x, axis),
        "scatter": comm.reduce_scatter_rows(x, axis),
        **{op: comm.all_reduce(x.clone(), axis, op) for op in ("sum", "max", "min")},
    }
    dealt = [rows * ((axis.index + other) % axis.size) // (axis.size - 1) for other in range(axis.size)]
    results["exchange"] = comm.all_to_all_rows(x[: 2 * sum(dealt)].view(-1, 2), dealt, dealt, axis)
    if len(x) and x.dtype.is_floating_point and x.dtype != torch.float64:
        comm.reduce_scatter_into_start(summed, x, torch.empty_like(x), axis).wait()
        comm.reduce_scatter_into_start(added, x, torch.empty_like(x), axis, accumulate=True).wait()
        results |= {"into": summed, "onto": added}
    return results


def compare(world: World) -> list[str]:
    shared, gloo = axes(world)
    different = []
    for dtype in DTYPES:
        for count in (0, 1, 7, 1000, FLOATS + 17):
            x = numbers(world.rank, count * world.size, dtype)
            ours, theirs = collectives(x, shared), collectives(x, gloo)
            different += [f"{k} {dtype} {count}" for k in theirs if not torch.equal(ours[k], theirs[k])]
    return different


@pytest.mark.parametrize("ranks", [2, 3])
def test_results_are_those_of_gloo(ranks: int) -> None:
    assert run_ranks(ranks, compare, timeout=120) == [[]] * ranks


def rounding(world: World) -> tuple[Tensor, Tensor]:
    axis, _ = axes(world)
    x = torch.tensor([256.0, 1.0, 1.0][world.rank]).bfloat16().repeat(64)
    return comm.all_reduce(x.clone(), axis), comm.all_reduce(torch.full((5,), 0.1 * (world.rank + 1)), axis)


def test_16_bit_numbers_are_added_in_fp32_and_all_ranks_get_the_same_bits() -> None:
    results = run_ranks(3, rounding)
    assert all((sums == 258).all() for sums, _ in results)  # 256 + 1 is 256 in bf16
    assert all(torch.equal(tenths, results[0][1]) for _, tenths in results)


def many(world: World) -> bool:
    """More operations under way than there are slots, of all sizes, waited for in another order than started."""
    axis, _ = axes(world)
    sizes = [1, 5000, FLOATS + 3, 64, 17, 3 * FLOATS, 2] * 3
    xs = [numbers(world.rank + 10 * i, size, torch.float32) for i, size in enumerate(sizes)]
    pending = [comm.all_gather_rows_start(x, axis) for x in xs]
    if world.rank:
        time.sleep(0.3)  # the others are ahead by then
    good = True
    for i in reversed(range(len(sizes))):
        expected = torch.cat([numbers(r + 10 * i, sizes[i], torch.float32) for r in range(world.size)])
        good &= torch.equal(pending[i].wait(), expected)
    return good


def test_operations_may_be_waited_for_in_any_order() -> None:
    assert run_ranks(3, many) == [True] * 3


def ahead(world: World) -> float:
    """How long the first rank is held up by `SLOTS` operations that the second comes to half a second later."""
    axis, _ = axes(world)
    comm.barrier(axis)
    time.sleep(0.5 * world.rank)
    start = time.perf_counter()
    pending = [comm.all_reduce_start(torch.ones(10), axis) for _ in range(SLOTS)]
    elapsed = time.perf_counter() - start
    for p in pending:
        assert (p.wait() == world.size).all()
    return elapsed


def test_a_start_does_not_wait_for_the_others() -> None:
    assert run_ranks(2, ahead)[0] < 0.25


def round_the_clock(world: World) -> bool:
    axis, _ = axes(world)
    assert axis.channel is not None
    comm.barrier(axis)
    comm.all_reduce(torch.ones(1), make_grid(GridShape(data=world.size), world, shared_memory=False).data)
    start = 2**32 - 3  # as after many operations
    axis.channel._next = start
    axis.channel._deposited[world.rank].value = axis.channel._collected[world.rank].value = start
    comm.all_reduce(torch.ones(1), make_grid(GridShape(data=world.size), world, shared_memory=False).data)
    return all((comm.all_reduce(torch.full((3,), 1.0 + i), axis) == (1 + i) * world.size).all() for i in range(8))


def test_counters_go_round() -> None:
    assert run_ranks(2, round_the_clock) == [True, True]


def deserted(world: World) -> tuple[str, float]:
    """The second rank of the axis is a process that ends."""
    axis, _ = axes(world)
    assert axis.channel is not None
    comm.barrier(axis)
    if world.rank == 1:
        return "", 0.0
    gone = os.fork()
    if not gone:
        time.sleep(0.3)
        os._exit(0)
    axis.channel.memory.pids = (os.getpid(), gone)
    start = time.perf_counter()
    try:
        comm.all_reduce(torch.ones(1), axis)
    except PeerLostError as error:
        return str(error), time.perf_counter() - start
    return "it came", 0.0


def test_a_rank_that_ends_is_noticed_soon() -> None:
    message, seconds = run_ranks(2, deserted)[0]
    assert "all_reduce along the data axis (0, 1) failed: rank 1 of the axis" in message and "has ended" in message
    assert seconds < 5


def late(world: World) -> str:
    axis, _ = axes(world, timeout=1.0)
    comm.barrier(axis)
    if world.rank == 1:
        time.sleep(3)
        return ""
    try:
        comm.all_reduce(torch.ones(1), axis)
    except PeerLostError as error:
        return str(error)
    return "it came"


def test_a_rank_that_does_not_come_in_time() -> None:
    assert "did not come within 1 seconds" in run_ranks(2, late)[0]


DIFFERENT: dict[str, tuple[Callable[[Axis], object], str]] = {
    # what rank 1 does while rank 0 sums 6 fp32 numbers, and how it is named
    "length": (lambda axis: comm.all_reduce(torch.ones(5), axis), "all_reduce(sum) of 5 float32"),
    "rounds": (lambda axis: comm.all_reduce(torch.ones(FLOATS + 6), axis), f"all_reduce(sum) of {FLOATS + 6} float32"),
    "type": (lambda axis: comm.all_reduce(torch.ones(6, dtype=torch.int32), axis), "all_reduce(sum) of 6 int32"),
    "reduction": (lambda axis: comm.all_reduce(torch.ones(6), axis, "max"), "all_reduce(max) of 6 float32"),
    "gather": (lambda axis: comm.all_gather_rows(torch.ones(6), axis), "all_gather of 6 float32"),
    "scatter": (lambda axis: comm.reduce_scatter_rows(torch.ones(6), axis), "reduce_scatter of 6 float32"),
    "exchange": (
        lambda axis: comm.all_to_all_rows(torch.ones(3, 2), [1, 2], [1, 2], axis),
        "all_to_all of rows of 8 bytes, float32",
    ),
}


def at_odds(world: World) -> dict[str, str]:
    found = {}
    for name, (other, _) in DIFFERENT.items():
        axis, _ = axes(world)
        comm.all_reduce(torch.ones(6), axis)
        with pytest.raises(MismatchError) as error:
            other(axis) if world.rank else comm.all_reduce(torch.ones(6), axis)
        found[name] = str(error.value)
    return found


def misdealt(world: World) -> str:
    """Rank 0 awaits two rows, of which rank 1 sends one."""
    axis, _ = axes(world)
    if world.rank:
        return str(comm.all_to_all_rows(torch.ones(2), [1, 1], [2, 1], axis).tolist())
    with pytest.raises(MismatchError) as error:
        comm.all_to_all_rows(torch.ones(3), [1, 2], [1, 2], axis)
    return str(error.value)


def test_a_rank_that_is_sent_other_than_it_awaits_says_so() -> None:
    message, _ = run_ranks(2, misdealt)
    assert message.endswith("rank 0 of the axis awaits 8 bytes from rank 1, which sends 4")


def test_ranks_that_are_at_different_operations_are_told_so() -> None:
    for rank, found in enumerate(run_ranks(2, at_odds)):
        for name, message in found.items():
            at = ["all_reduce(sum) of 6 float32", DIFFERENT[name][1]]
            own, other = f"rank {rank} of the axis is at {at[rank]}", f"rank {1 - rank} at {at[1 - rank]}"
            assert message.endswith(f"{own}, {other}") and "ranks (0, 1) along the data axis" in message


def test_a_process_that_has_ended_does_not_live() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    time.sleep(0.2)
    assert host.lives(os.getpid()) and not host.lives(pid)  # a zombie, until it is waited for
    os.waitpid(pid, 0)
    assert not host.lives(pid)


def test_memory_of_others_is_refused() -> None:
    path, fd = host.offer(64, "00" * 16)
    with pytest.raises(OSError, match="not that of rank 0"):
        host.Memory(path, 64, 0, [os.getpid()] * 2, 1.0, "01" * 16)
    os.close(fd)
