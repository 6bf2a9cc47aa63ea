"""Context parallelism: the tokens of one image over ranks, and the moves between them that attention needs.

Every move is one autograd node whose backward pass is its exact transpose, so gradients are those of the sum over ranks
of what each rank computes. A part that all ranks compute alike (the head after pooling) is therefore counted once
per rank: its loss is divided by the number of ranks.

Legend: C ranks of the context axis, B images, S tokens on this rank, N tokens of an image, h heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis
from parallel.layout import split_range
from parallel.tensor.products import attention


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return comm.all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return comm.all_to_all_rows(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return comm.all_to_all_rows(grads[0], ctx.receive, ctx.send, ctx.axis), None, None, None


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's `x`, on every rank. Every rank must go on to use it, or its backward pass waits."""
    return x if axis.size == 1 else _SumOver.apply(x, axis)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Rows [sum(send), ...], in order of destination -> rows [sum(receive), ...], in order of source."""
    return x if axis.size == 1 else _Exchange.apply(x, tuple(send), tuple(receive), axis)


def share_first(x: Tensor, own: int, count: int, axis: Axis) -> Tensor:
    """The first `count` tokens of the image on every rank: [B, S, ...] -> [B, count, ...].

    Args:
        own: how many of them this rank holds, at the start of `x`: all or none.
    """
    if axis.size == 1:
        return x[:, :count]
    missing = (0, 0) * (x.dim() - 2) + (0, count - own)
    return sum_over(F.pad(x[:, :own], missing), axis)


def tokens_to_heads(x: Tensor, counts: Sequence[int], axis: Axis) -> Tensor:
    """All tokens of some heads in exchange for all heads of some tokens (Jacobs et al. 2023, DeepSpeed-Ulysses).

    Args:
        x: [P, B, S, h, K], P arrays that travel together. counts: tokens of each rank.

    Returns:
        [P, B, N, h', K], h' this rank's share of the h heads.
    """
    p, b, _, heads, k = x.shape
    shares = [split_range(heads, axis.size, i) for i in range(axis.size)]
    own = shares[axis.index][1] - shares[axis.index][0]
    parts = [x[:, :, :, start:stop].flatten() for start, stop in shares]
    receive = [p * b * n * own * k for n in counts]
    flat = exchange(torch.cat(parts), [part.numel() for part in parts], receive, axis)
    return torch.cat([part.view(p, b, n, own, k) for part, n in zip(flat.split(receive), counts, strict=True)], 2)


def heads_to_tokens(x: Tensor, heads: int, counts: Sequence[int], axis: Axis) -> Tensor:
    """The way back: [B, N, h', K] -> [B, S, h, K], `heads` = h."""
    b, _, _, k = x.shape
    shares = [stop - start for start, stop in (split_range(heads, axis.size, i) for i in range(axis.size))]
    parts = [part.flatten() for part in x.split(list(counts), 1)]
    receive = [b * counts[axis.index] * share * k for share in shares]
    flat = exchange(torch.cat(parts), [part.numel() for part in parts], receive, axis)
    pieces = [part.view(b, -1, share, k) for part, share in zip(flat.split(receive), shares, strict=True)]
    return torch.cat(pieces, 2)


def attend_everywhere(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """Softmax attention of a few queries, the same on every rank, to the tokens of all ranks.

    Each rank's share of numerator and denominator, under the common largest score, is summed over ranks.

    Args:
        q: [B, h, P, K]. k, v: [B, h, S, K], this rank's tokens.

    Returns:
        [B, h, P, K] on every rank.
    """
    if axis.size == 1:
        return attention(q, k, v)
    wide = torch.promote_types(v.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) / math.sqrt(q.shape[-1])
    largest = comm.all_reduce(scores.detach().amax(-1, keepdim=True).contiguous(), axis, "max")
    weights = torch.exp(scores - largest)
    shares = torch.cat([weights @ v.to(wide), weights.sum(-1, keepdim=True)], -1)
    total = sum_over(shares, axis)
    return (total[..., :-1] / total[..., -1:]).to(v.dtype)
