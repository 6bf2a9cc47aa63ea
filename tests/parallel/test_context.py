"""Moves of tokens along a context axis against plain indexing, and each gradient as that of the sum over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.context import attend_everywhere, exchange, heads_to_tokens, share_first, sum_over, tokens_to_heads
from parallel.grid import GridShape, make_grid
from parallel.layout import split_range
from parallel.process_group import World
from tests.distributed import run_ranks


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    assert ours is not None, what
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")


def check(
    axis: Axis,
    inputs: Sequence[Tensor],
    ours: Callable[[Tensor], Tensor],
    all_of_it: Callable[..., list[Tensor]],
    what: str,
) -> None:
    """Value and gradient of a move.

    Args:
        inputs: of every rank. ours: what this rank makes of its own. all_of_it: from all inputs, what every rank gets,
            by indexing in one process.
    """
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = all_of_it(*leaves)
    weights = [numbers(*y.shape, seed=100 + i) for i, y in enumerate(outputs)]
    torch.autograd.backward([(y * w).sum() for y, w in zip(outputs, weights, strict=True)])
    own = inputs[axis.index].clone().requires_grad_()
    out = ours(own)
    close(out, outputs[axis.index].detach(), what)
    (out * weights[axis.index]).sum().backward()
    expected = leaves[axis.index].grad
    close(own.grad, torch.zeros_like(own) if expected is None else expected, f"gradient of {what}")


def _exchange(axis: Axis, sizes: list[list[int]]) -> None:
    """sizes: rows from each rank to each."""
    send, receive = sizes[axis.index], [row[axis.index] for row in sizes]

    def all_of_it(*inputs: Tensor) -> list[Tensor]:
        parts = [x.split(row) for x, row in zip(inputs, sizes, strict=True)]
        return [torch.cat([rows[i] for rows in parts]) for i in range(axis.size)]

    inputs = [numbers(sum(row), 2, 3, seed=i) for i, row in enumerate(sizes)]
    check(axis, inputs, lambda x: exchange(x, send, receive, axis), all_of_it, f"exchange {sizes}")
    turned = [x.transpose(1, 2).contiguous() for x in inputs]
    check(
        axis,
        turned,
        lambda x: exchange(x.transpose(1, 2), send, receive, axis),
        lambda *x: all_of_it(*(part.transpose(1, 2) for part in x)),
        f"exchange of a view {sizes}",
    )


def _sums(axis: Axis) -> None:
    inputs = [numbers(3, 4, seed=i) for i in range(axis.size)]
    everywhere = lambda *x: [sum(x[1:], x[0])] * axis.size  # noqa: E731
    check(axis, inputs, lambda x: sum_over(x, axis), everywhere, "sum_over")
    check(
        axis, inputs, lambda x: sum_over(x.t(), axis), lambda *x: [y.t() for y in everywhere(*x)], "sum_over of a view"
    )
    x = inputs[axis.index].clone()
    sum_over(x, axis)
    assert torch.equal(x, inputs[axis.index])  # left alone


def _first_tokens(axis: Axis, count: int, *tail: int) -> None:
    own = count if axis.index == 0 else 0
    inputs = [numbers(2, (count if i == 0 else 0) + 4 - i, *tail, seed=i) for i in range(axis.size)]
    everywhere = lambda *x: [x[0][:, :count]] * axis.size  # noqa: E731
    check(axis, inputs, lambda x: share_first(x, own, count, axis), everywhere, f"share_first {count} {tail}")


def _heads(axis: Axis, counts: Sequence[int], heads: int) -> None:
    counts = counts[: axis.size]
    shares = [slice(*split_range(heads, axis.size, i)) for i in range(axis.size)]
    what = f"{counts} tokens, {heads} heads, {axis.size} ranks"
    tokens = [numbers(3, 2, n, heads, 5, seed=i) for i, n in enumerate(counts)]  # q, k and v together
    check(
        axis,
        tokens,
        lambda x: tokens_to_heads(x, counts, axis),
        lambda *x: [torch.cat(x, 2)[:, :, :, share] for share in shares],
        f"tokens_to_heads of {what}",
    )
    parts = [numbers(2, sum(counts), share.stop - share.start, 5, seed=i) for i, share in enumerate(shares)]
    check(
        axis,
        parts,
        lambda x: heads_to_tokens(x, heads, counts, axis),
        lambda *x: list(torch.cat(x, 2).split(list(counts), 1)),
        f"heads_to_tokens of {what}",
    )
    whole = tokens[axis.index]
    back = heads_to_tokens(tokens_to_heads(whole, counts, axis)[1], heads, counts, axis)
    assert torch.equal(back, whole[1]), what


def _attention(axis: Axis, counts: Sequence[int], size: float) -> None:
    """A few queries, the same on every rank, to the tokens of all; large scores must not overflow."""
    counts = counts[: axis.size]
    start = sum(counts[: axis.index])
    own = slice(start, start + counts[axis.index])
    q, k, v = (numbers(2, 3, n, 4, seed=i) for i, n in enumerate((2, sum(counts), sum(counts))))
    k *= size
    weights = [numbers(2, 3, 2, 4, seed=100 + i) for i in range(axis.size)]
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = F.softmax(whole[0] @ whole[1].transpose(2, 3) / 2, -1) @ whole[2]
    (expected * torch.stack(weights).sum(0)).sum().backward()
    ours = [x.clone().requires_grad_() for x in (q, k[:, :, own], v[:, :, own])]
    out = attend_everywhere(*ours, axis)
    (out * weights[axis.index]).sum().backward()
    what = f"attend_everywhere, {counts} tokens, size {size}"
    close(out, expected.detach(), what)
    shares = [x.grad for x in ours]
    assert shares[0] is not None
    shares[0] = comm.all_reduce(shares[0].clone(), axis)  # each rank has the part of its own tokens
    for name, share, x, part in zip("qkv", shares, whole, (slice(None), own, own), strict=True):
        assert x.grad is not None
        close(share, x.grad[:, :, part], f"gradient of {name} in {what}")
    low = attend_everywhere(*(x.detach().bfloat16() for x in ours), axis)
    assert low.dtype == torch.bfloat16


def _all(world: World) -> None:
    axis = make_grid(GridShape(context=world.size), world).context
    n = axis.size
    for sizes in ([[(i + 2 * j) % 4 for j in range(n)] for i in range(n)], [[0] * n] * n):
        _exchange(axis, sizes)
    _exchange(axis, [[3 if i == j else 0 for j in range(n)] for i in range(n)])
    _sums(axis)
    for count, *tail in ((1,), (3,), (1, 2, 3), (3, 2)):
        _first_tokens(axis, count, *tail)
    for counts, heads in (((4, 2, 3), 3), ((5, 1, 2), 7), ((2, 2, 2), 6), ((1, 6, 1), 4)):
        _heads(axis, counts, heads)
    for counts in ((4, 2, 3), (1, 6, 1)):
        for size in (1.0, 500.0):
            _attention(axis, counts, size)


@pytest.mark.parametrize("ranks", [2, 3])
def test_moves(ranks: int) -> None:
    run_ranks(ranks, _all)


def test_an_axis_of_one_rank_moves_nothing() -> None:
    axis, x = single_axis("context"), numbers(2, 5, 3, seed=0)
    assert sum_over(x, axis) is exchange(x, [2], [2], axis) is x
    assert torch.equal(share_first(x, 2, 2, axis), x[:, :2])
    q, k, v = (numbers(2, 3, n, 4, seed=n) for n in (1, 5, 5))
    torch.testing.assert_close(attend_everywhere(q, k, v, axis), F.softmax(q @ k.transpose(2, 3) / 2, -1) @ v)
    assert not axis.meter.calls
