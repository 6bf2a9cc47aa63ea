"""Native linear attention as torch operators. Kept for the backward pass: q, k, v, and S, z, den in fp32; features are
recomputed.

Where tokens are split over ranks, S and z (in backward dS and dz) are added up between the phases of the kernel. That
is a plain autograd.Function: no compiler sees through a Python callable that communicates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native
from .registry import LIBRARY, differentiable

FEATURE_CODE = {"elu": 0, "relu": 1, "focused": 2}  # the numbers are those of csrc/cpu/linear_attention_args.h

LIBRARY.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, str feature_map, int power, float eps)"
    " -> (Tensor out, Tensor s, Tensor z, Tensor den)"
)
LIBRARY.define(
    "linear_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor s, Tensor z, Tensor den,"
    " str feature_map, int power) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    value_dim = v.shape[-1]
    return (
        torch.empty((batch, heads, tokens, value_dim), dtype=q.dtype, device=q.device),
        torch.empty((batch, heads, dim, value_dim), dtype=torch.float32, device=q.device),
        torch.empty((batch, heads, dim), dtype=torch.float32, device=q.device),
        torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device),
    )


def channels_contiguous(t: Tensor) -> Tensor:
    """t, copied only if its last dimension is not dense."""
    return t if t.stride(-1) == 1 else t.contiguous()


def place(t: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where [B, H, N, K] lies: its address, and the strides of all but the channels."""
    return native.address(t), t.stride()[:3]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, power: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = map(channels_contiguous, (q, k, v))
    out, s, z, den = outputs = _outputs(q, v)
    module, where = native.target(q)
    module.linear_attention_forward(
        *place(q), *place(k), *place(v),
        native.address(out), native.address(s), native.address(z), native.address(den),
        (*q.shape, v.shape[-1]), native.DTYPE_CODE[q.dtype], FEATURE_CODE[feature_map], power, eps, where,
    )  # fmt: skip
    return outputs


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, den: Tensor, feature_map: str, power: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_backward(grad, q, k, v, s, z, den, feature_map, power)
    grad, q, k, v = map(channels_contiguous, (grad, q, k, v))
    module, where = native.target(q)
    module.linear_attention_backward(
        *place(grad), *place(q), *place(k), *place(v),
        native.address(s.contiguous()), native.address(z.contiguous()), native.address(den.contiguous()),
        *(native.address(t) for t in grads),
        (*q.shape, v.shape[-1]), native.DTYPE_CODE[q.dtype], FEATURE_CODE[feature_map], power, where,
    )  # fmt: skip
    return grads


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, feature_map: str, power: int, eps: float) -> tuple[Tensor, ...]:
    return _outputs(q, v)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, den: Tensor, feature_map: str, power: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    return grads[0], grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.feature_map, ctx.power, _eps = inputs
    _out, s, z, den = output
    ctx.save_for_backward(q, k, v, s, z, den)
    ctx.mark_non_differentiable(s, z, den)
    ctx.set_materialize_grads(False)


def _differentiate(
    backward: Callable[..., Any], ctx: Any, grad: Tensor | None, *_rest: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    grads = backward(grad, *ctx.saved_tensors, ctx.feature_map, ctx.power)
    return *grads, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, feature_map: str, power: int, eps: float) -> None:
    checks.attention_input(q, k, v, feature_map, power, eps)
    checks.native_types(q=q, k=k, v=v)


def _check_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, den: Tensor, feature_map: str, power: int
) -> None:
    _check(q, k, v, feature_map, power, 0.0)
    checks.shaped("grad", grad, v.shape, q)
    (*groups, tokens, dim), value_dim = q.shape, v.shape[-1]
    for name, value, shape in (("s", s, (dim, value_dim)), ("z", z, (dim,)), ("den", den, (tokens,))):
        checks.shaped(name, value, (*groups, *shape), q, torch.float32)


linear_attention = differentiable(
    "linear_attention",
    forward=_forward,
    backward=_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    check=_check,
    check_backward=_check_backward,
    setup_context=_setup_context,
    differentiate=_differentiate,
)


def _packed_sums(q: Tensor, v: Tensor) -> tuple[Tensor, int, int]:
    """One flat fp32 buffer for S [B, H, K, M] and z [B, H, K], and where the two lie in it."""
    keys = q.shape[0] * q.shape[1] * q.shape[3]
    packed = torch.empty(keys * (v.shape[-1] + 1), dtype=torch.float32, device=q.device)
    return packed, *_addresses(packed, v)


def _addresses(packed: Tensor, v: Tensor) -> tuple[int, int]:
    size = packed.numel() // (v.shape[-1] + 1) * v.shape[-1]
    return native.address(packed[:size]), native.address(packed[size:])


class _OverRanks(torch.autograd.Function):
    """The four phases, with the sum over ranks between them. `reduce` is called once forward and once backward, also
    without local tokens and whoever wants a gradient: the other ranks wait for it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_map: str,
        power: int,
        eps: float,
        reduce: Callable[[Tensor], object],
    ) -> Tensor:
        q, k, v = map(native.plain, (q, k, v))
        ctx.what = (*q.shape, v.shape[-1]), native.DTYPE_CODE[q.dtype], FEATURE_CODE[feature_map], power
        ctx.reduce = reduce
        out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        den = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        packed, s, z = _packed_sums(q, v)
        ctx.save_for_backward(q, k, v, packed, den)
        q, k, v = map(channels_contiguous, (q, k, v))
        module, where = native.target(q)
        module.linear_attention_state(*place(k), *place(v), s, z, *ctx.what, where)
        reduce(packed)
        module.linear_attention_output(*place(q), s, z, native.address(out), native.address(den), *ctx.what, eps, where)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, packed, den = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        grad, q, k, v = map(channels_contiguous, (native.plain(grads[0]), q, k, v))
        packed_grad, ds, dz = _packed_sums(q, v)
        module, where = native.target(q)
        module.linear_attention_backward_q(
            *place(grad), *place(q), *_addresses(packed, v), native.address(den), native.address(grad_q), ds, dz,
            *ctx.what, where,
        )  # fmt: skip
        ctx.reduce(packed_grad)
        module.linear_attention_backward_kv(
            *place(k), *place(v), ds, dz, native.address(grad_k), native.address(grad_v), *ctx.what, where
        )
        return grad_q, grad_k, grad_v, None, None, None, None


def linear_attention_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, power: int, eps: float, reduce: Callable[[Tensor], object]
) -> Tensor:
    """Attention of the local queries to the tokens of all ranks; reduce sums a flat fp32 tensor over ranks in place."""
    if torch.compiler.is_compiling():  # said here: as a decorator it imports the compiler, two seconds of each rank
        return torch.compiler.disable(_over_ranks)(q, k, v, feature_map, power, eps, reduce)
    return _over_ranks(q, k, v, feature_map, power, eps, reduce)


def _over_ranks(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, power: int, eps: float, reduce: Callable[[Tensor], object]
) -> Tensor:
    if q.is_meta:  # shapes alone: nothing to sum
        out: Tensor = linear_attention(q, k, v, feature_map, power, eps)[0]
        return out
    return _OverRanks.apply(q, k, v, feature_map, power, eps, reduce)
