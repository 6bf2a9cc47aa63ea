"""The three matrix products of a linear layer, and attention, in whatever format the operands have.

On a CPU whose instructions do not multiply bf16 or fp16, torch's own half-precision products take 4 to 45 times as long
as fp32 ones. There the operands are widened (their products are then exact), multiplied and summed in fp32, and the
result is rounded once, which is at least as accurate. [1576, 384] and [1536, 384] on one AVX2 core of an AMD EPYC, in
ms (fp32: 20 each):

|                         | y = x W' | dx = g W | dW = g' x |
|-------------------------|----------|----------|-----------|
| bf16 as torch does it   |      202 |      949 |        76 |
| fp16 as torch does it   |      172 |      875 |       344 |
| either, through fp32    |       22 |       21 |        21 |

Legend: R rows, D input width, F output width; weights are [F, D] as in torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# As Linux names them. Only x86: what torch does with half precision on Arm has not been measured here. AVX-512 without
# these instructions does not count: oneDNN emulates bf16 there, and has no fp16.
_INSTRUCTIONS = {torch.bfloat16: {"avx512_bf16", "amx_bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}

_PART = 1 << 19  # 2 MiB in fp32

_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _read_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


_FLAGS = _read_flags()  # at once: a compiler would trace the reading of the file


def through_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this format are taken through fp32 on this device."""
    return device.type == "cpu" and dtype in _INSTRUCTIONS and not _INSTRUCTIONS[dtype] & _cpu_flags()


def attends_through_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention in this format is computed in fp32 on this device: unless its processor multiplies tiles of it.

    Forward + backward of scaled_dot_product_attention on [8, 6, 197, 64] takes 125 ms in bf16 and 195 in fp16 on a core
    with AVX2, where through fp32 it takes 30. With AVX-512 for bf16, through fp32 takes 0.66 of the time of torch's
    bf16 there, 0.76 on [32, 6, 197, 64], 0.38 on [256, 6, 49, 64], 0.92 on [2, 16, 256, 88], 1.3 on [2, 16, 1024, 64];
    and torch rounds probabilities and their gradients to bf16, which makes the gradients' errors twice as large.
    """
    tiles = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    return device.type == "cpu" and dtype in tiles and tiles[dtype] not in _cpu_flags()


def _cpu_flags() -> frozenset[str]:
    """Instruction sets of this host's processor; none where the system does not say."""
    return _FLAGS


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W', [R, D] and [F, D] -> [R, F], in the operands' dtype."""
    if through_fp32(x.dtype, x.device):
        return F.linear(x.float(), weight.float()).to(x.dtype)
    return F.linear(x, weight)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """g W, [R, F] and [F, D] -> [R, D], in the operands' dtype."""
    if through_fp32(grad.dtype, grad.device):
        return (grad.float() @ weight.float()).to(grad.dtype)
    return grad @ weight


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None = None, *, accumulate: bool = False) -> Tensor:
    """g' x, [R, F] and [R, D] -> [F, D].

    Args:
        out: where to put it, fp32 (or of the operands' dtype); none: a new tensor of the operands' dtype.
        accumulate: add to what is in `out`.
    """
    if through_fp32(grad.dtype, grad.device):
        product = _product_into(grad.float().t(), x.float(), out, accumulate)
        return product if out is not None else product.to(x.dtype)
    return _product_into(grad.t(), x, out, accumulate)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """softmax(q k' / sqrt(K)) v, statistics in fp32: [B, h, P, K], [B, h, S, K] twice -> [B, h, P, K].

    Args:
        mask: [B, 1, P, S], true where a query sees a key; every query sees one. Not on CPUs also [B, h, P, S] in the
            operands' format, added to the logits. causal: query i sees keys 0 to i alone (without a mask, P = S).
    """
    if q.is_meta:  # keeps what a fused kernel keeps; torch would keep P x S scores here
        bias = None if mask is None else mask.to(q.dtype)
        out: Tensor = _efficient(q, k, v, bias, compute_log_sumexp=True, is_causal=causal)[0]
        return out
    if attends_through_fp32(q.dtype, q.device):
        return _WideAttention.apply(q, k, v, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class _WideAttention(torch.autograd.Function):
    """In fp32, a few images at a time, so that they stay in the caches and little is held in fp32; what is kept for
    backward is in the operands' format.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """[B, h, P, K], [B, h, S, K] twice, [B, 1, P, S] -> [B, h, P, K]."""
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        out, log_sums = torch.empty_like(q), []
        for part in _parts(q, k):
            own = None if bias is None else bias[part]
            wide, sums = _flash(q[part].float(), k[part].float(), v[part].float(), is_causal=causal, attn_mask=own)
            out[part] = wide
            log_sums.append(sums)
        ctx.save_for_backward(q, k, v, out, bias, *log_sums)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of q, k and v."""
        q, k, v, out, bias, *log_sums = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for part, sums in zip(_parts(q, k), log_sums, strict=True):
            wide = (x[part].float() for x in (grad, q, k, v, out))
            own = None if bias is None else bias[part]
            for whole, given in zip(grads, _flash_backward(*wide, sums, 0.0, ctx.causal, attn_mask=own), strict=True):
                whole[part] = given
        return *grads, None, None


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Images [0, B) in runs of at most _PART queries' or keys' numbers, or one by one."""
    each = max(q.numel(), k.numel()) // max(1, len(q))
    size = max(1, _PART // max(1, each))
    return [slice(start, start + size) for start in range(0, len(q), size)]


def _product_into(a: Tensor, b: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    """a b, new, or over or onto `out`, which may be wider than a and b."""
    if out is None:
        return a @ b
    if out.dtype != a.dtype:
        return _widening_product(a, b, out, accumulate)
    return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)


def _widening_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """Product of half-precision matrices over or onto an fp32 one.

    On CUDA the product is never rounded to half precision. For CPUs torch (2.13) has no such product: on those that
    multiply half precision themselves (others do not come here) each micro-batch's share is rounded once, then added
    in fp32. Through fp32 nothing would be rounded, but AVX-512 multiplies bf16 over four times as fast as fp32.
    """
    if not out.is_cuda:
        return _add_widened(out, a @ b) if accumulate else out.copy_(a @ b)
    if not accumulate:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if _adds_onto_fp32(a.dtype, out.device):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))


def _add_widened(out: Tensor, x: Tensor) -> Tensor:
    """out += x, a few rows at a time: torch would make a copy of all of x in the type of `out`."""
    rows = max(1, _PART // x.shape[1])
    for part, added in zip(out.split(rows), x.split(rows), strict=True):
        part.add_(added)
    return out


@cache
def _adds_onto_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's addmm takes an fp32 sum beside half-precision factors on CUDA; early forms of it refuse."""
    a, out = torch.zeros(8, 8, dtype=dtype, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True
