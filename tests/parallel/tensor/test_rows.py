"""Moving rows between ranks: parts make up the whole, and every backward is the transpose of its forward."""

import pytest
import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from parallel.tensor import TensorParallel, copy_in, enter, gather_rows, leave, no_tensor_parallel, slice_rows
from parallel.tensor.rows import pad_rows, sum_start
from tests.distributed import run_ranks

ROWS = (1, 5, 8, 9)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_parts_cover_the_rows(size: int, rows: int) -> None:
    x, parts = _random(rows, 3), []
    for index in range(size):
        axis = Axis(name="tensor", ranks=tuple(range(size)), index=index, group=object())  # type: ignore[arg-type]
        tp = TensorParallel(axis=axis, sequence_parallel=True)
        assert tp.splits_rows
        start, stop = tp.row_range(rows)
        assert stop - start == tp.local_rows(rows) == -(-rows // size)
        parts.append(slice_rows(x, tp))
        whole = TensorParallel(axis=axis)
        assert whole.row_range(rows) == (0, rows) and slice_rows(x, whole) is x
    together = torch.cat(parts)
    assert torch.equal(together[:rows], x)
    assert not together[rows:].any()


def test_padding() -> None:
    x = torch.ones(2, 3)
    assert pad_rows(x, 2) is x
    assert pad_rows(x, 4).tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert pad_rows(torch.ones(2), 3).tolist() == [1, 1, 0]
    assert pad_rows(torch.ones(1, 2, 2), 2).shape == (2, 2, 2)


def test_one_rank_moves_nothing() -> None:
    x, alone = torch.ones(3, 2), TensorParallel(axis=single_axis("tensor"), sequence_parallel=True)
    assert not alone.splits_rows
    assert slice_rows(x, alone) is gather_rows(x, alone, 3) is copy_in(x, alone.axis) is x
    assert enter(x, alone, 3) is leave(x, alone) is x
    assert no_tensor_parallel().size == 1
    assert alone.axis.meter.calls == {}


def _moves(world: World) -> None:
    axis = make_grid(GridShape(tensor=world.size), world).tensor
    split, whole = (TensorParallel(axis=axis, sequence_parallel=sp) for sp in (True, False))
    for rows in ROWS:
        x, weights = _random(rows, 3), _random(rows, 3, seed=1)
        # gather_rows: everybody goes on to do the same, so this rank's slice of the gradient is the gradient
        local = slice_rows(x, split)
        start, stop = (min(edge, rows) for edge in split.row_range(rows))
        local[stop - start :] = float("nan")  # padding is never used
        local.requires_grad_()
        gathered = gather_rows(local, split, rows)
        assert torch.equal(gathered, x)
        axis.meter.reset()
        (gathered * weights).sum().backward()
        assert local.grad is not None
        assert torch.equal(local.grad, slice_rows(weights, split))
        assert not axis.meter.calls
        assert gather_rows(x, whole, rows) is x

        # copy_in: everybody's gradient counts, and the one handed in is left alone
        x.requires_grad_()
        own = weights * (world.rank + 1)
        kept = own.clone()
        copied = copy_in(x, axis)
        assert torch.equal(copied, x)
        copied.backward(own)
        ranks = sum(range(1, world.size + 1))
        torch.testing.assert_close(x.grad, weights * ranks)
        assert torch.equal(own, kept)

        # sum_start: to row parts, or whole
        torch.testing.assert_close(sum_start(own.clone(), split, True).wait(), slice_rows(weights * ranks, split))
        torch.testing.assert_close(sum_start(own.clone(), split, False).wait(), weights * ranks)
        for tp in (split, whole):
            _check_enter_and_leave(tp, rows)
    comm.barrier(axis)


def _check_enter_and_leave(tp: TensorParallel, rows: int) -> None:
    """y = sum over ranks of tanh(x W_rank), against all of it on one process; padding is never used."""
    matrices = [_random(3, 2, seed=10 + i) for i in range(tp.size)]
    x, weights = _random(rows, 3).requires_grad_(), _random(rows, 2, seed=1)
    y = torch.stack([(x @ w).tanh() for w in matrices]).sum(0)
    y.backward(weights)
    start, stop = (min(edge, rows) for edge in tp.row_range(rows))
    local = slice_rows(x.detach(), tp).clone()
    local[stop - start :] = float("nan")
    local.requires_grad_()
    entered = enter(local, tp, rows)
    assert torch.equal(entered, x)
    left = leave((entered @ matrices[tp.axis.index]).tanh(), tp)
    assert left.shape == (tp.local_rows(rows), 2)
    torch.testing.assert_close(left[: stop - start], y[start:stop])
    left.backward(slice_rows(weights, tp))
    assert local.grad is not None and x.grad is not None
    torch.testing.assert_close(local.grad, slice_rows(x.grad, tp))


@pytest.mark.parametrize("ranks", [2, 4])
def test_moves(ranks: int) -> None:
    run_ranks(ranks, _moves)
