"""Softmax attention in groups whose logits have a learned bias added, of which a gradient is wanted.

torch's fused kernel for CPUs gives no gradient of what is added to the logits; its other form keeps the probabilities
of every group. Here they are computed again in the backward pass, a few groups at a time; what is kept is q, k and v.

Legend: N groups of B images, G of each, h heads, L slots of a group, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.tensor import products

_PART = 1 << 19  # logits at a time: 2 MiB in fp32


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(K) + bias) v, in fp32 at least on CPUs: [N, h, L, K] each -> [N, h, L, K].

    Args:
        bias: [h, L, L]. mask: bool [G, L, L], true where a query (row) sees a key, of the groups of each image in turn;
            None where all see all.
    """
    whole = torch.compiler.is_compiling()  # a compiler or exporter gets it as one operation
    if q.device.type == "cpu" and not whole:
        out: Tensor = _BiasedAttention.apply(q, k, v, bias, mask)
        return out
    added = _added(bias.to(q.dtype), mask)
    added = added.expand(q.shape[0] // max(1, len(added)), *added.shape).flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, v, added) if whole else products.attention(q, k, v, added)


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    """[G, h, L, L], or [1, h, L, L] for all groups: the bias, -inf where a key is not seen."""
    return bias[None] if mask is None else bias[None].masked_fill(~mask[:, None], -torch.inf)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, mask)
        out = torch.empty_like(q)
        added = _added(_wide(bias), mask)
        for part in _parts(added, len(q)):
            out[part] = _probabilities(q[part], k[part], added) @ _wide(v[part])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask = ctx.saved_tensors
        added, scale = _added(_wide(bias), mask), 1 / math.sqrt(q.shape[-1])
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        grad_bias = torch.zeros_like(_wide(bias))
        for part in _parts(added, len(q)):
            weights, grad = _probabilities(q[part], k[part], added), _wide(grads[0][part])
            grad_v[part] = weights.mT @ grad
            grad_weights = grad @ _wide(v[part]).mT
            logits = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
            grad_q[part] = logits @ _wide(k[part]) * scale
            grad_k[part] = logits.mT @ _wide(q[part]) * scale
            grad_bias += logits.sum(0)
        return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _probabilities(q: Tensor, k: Tensor, added: Tensor) -> Tensor:
    """[n, h, L, K] twice, [G, h, L, L] -> [n, h, L, L]."""
    scores = _wide(q) @ _wide(k).mT / math.sqrt(q.shape[-1])
    return torch.softmax((scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1), -1)


def _parts(added: Tensor, groups: int) -> Iterator[slice]:
    """Groups [0, groups) in runs of whole images where they differ in their mask."""
    if added.numel():
        step = len(added) * max(1, _PART // added.numel())
        yield from (slice(start, start + step) for start in range(0, groups, step))
