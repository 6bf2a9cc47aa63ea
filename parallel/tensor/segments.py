"""Attention within consecutive segments of rows: images of several sizes behind each other, none of which sees another.

No mask is made. On CPUs each segment is attended to by itself, in one node of autograd for all of them, which keeps
what attention over a batch of equal images keeps; on CUDA half precision takes flash attention over segments (Dao et
al. 2022), the rest one call each.

Legend: P rows of queries, R rows of keys and values, h heads, K head dim; n segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from parallel.tensor.products import attends_through_fp32, attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def segment_attention(q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    """softmax(q k' / sqrt(K)) v of each segment, statistics in fp32: [P, h, K], [R, h, K] twice -> [P, h, K].

    Args:
        queries, keys: rows of each segment [n], one at least; rows behind the last belong to none: of queries they give
            zeros, and their gradients are zero.
    """
    if not q.is_cuda:
        return _Segments.apply(q, k, v, tuple(queries), tuple(keys))
    used, seen = sum(queries), sum(keys)
    own = q[:used], k[:seen], v[:seen]
    if q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn  # imports a compiler, which takes seconds

        of, to = (torch.tensor([0, *accumulate(rows)], dtype=torch.int32, device=q.device) for rows in (queries, keys))
        out: Any = varlen_attn(*own, of, to, max(queries), max(keys))
    else:
        parts = zip(*(x.split(list(rows)) for x, rows in zip(own, (queries, keys, keys), strict=True)), strict=True)
        out = torch.cat([attention(*(_batch(x) for x in part))[0].transpose(0, 1) for part in parts])
    return out if used == len(q) else torch.cat([out, out.new_zeros(len(q) - used, *out.shape[1:])])


def _batch(x: Tensor) -> Tensor:
    """[S, h, K] -> [1, h, S, K]."""
    return x.transpose(0, 1)[None]


class _Segments(torch.autograd.Function):
    """Segment by segment, in fp32 where a processor has no units for half precision (parallel.tensor.products); what is
    kept for backward is in the operands' format.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: tuple[int, ...], keys: tuple[int, ...]) -> Tensor:
        """As segment_attention."""
        ctx.queries, ctx.keys = queries, keys
        ctx.wide = torch.float32 if attends_through_fp32(q.dtype, q.device) else q.dtype
        out, sums = q.new_zeros(q.shape), list[Tensor]()
        for of, to in _segments(queries, keys):
            wide, sum_of = _flash(*(_batch(x).to(ctx.wide) for x in (q[of], k[to], v[to])))
            out[of] = wide[0].transpose(0, 1)
            sums.append(sum_of)
        ctx.save_for_backward(q, k, v, out, torch.cat(sums, 2))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of q, k and v."""
        q, k, v, out, sums = ctx.saved_tensors
        grads = [x.new_zeros(x.shape) for x in (q, k, v)]
        for of, to in _segments(ctx.queries, ctx.keys):
            wide = (_batch(x).to(ctx.wide) for x in (grad[of], q[of], k[to], v[to], out[of]))
            given = _flash_backward(*wide, sums[:, :, of].contiguous(), 0.0, False)
            for whole, rows, part in zip(grads, (of, to, to), given, strict=True):
                whole[rows] = part[0].transpose(0, 1)
        return *grads, None, None


def _segments(queries: Sequence[int], keys: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries, and of the keys, of each segment."""
    bounds = (pairwise(accumulate(rows, initial=0)) for rows in (queries, keys))
    for (a, b), (c, d) in zip(*bounds, strict=True):
        yield slice(a, b), slice(c, d)
