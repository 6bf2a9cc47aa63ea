"""Native norm of queries and keys on the packed projection, as torch operators.

One pass reads [.., 3 * H * K], normalises q and k per head and copies v, so that the gradient of the whole projection
is also written
in one pass. Kept for the backward pass: the projection and two or four fp32 numbers per head and token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, native
from .registry import LIBRARY, differentiable

LIBRARY.define(
    "qk_norm(Tensor packed, Tensor? q_weight, Tensor? k_weight, int heads, float eps, bool rms)"
    " -> (Tensor q, Tensor k, Tensor v, Tensor mean, Tensor rstd)"
)
LIBRARY.define(
    "qk_norm_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor packed, Tensor? q_weight, Tensor? k_weight,"
    " Tensor mean, Tensor rstd, int heads) -> (Tensor grad_packed, Tensor grad_q_weight, Tensor grad_k_weight)"
)
LIBRARY.define("qk_norm_(Tensor(a!) packed, Tensor? q_weight, Tensor? k_weight, int heads, float eps, bool rms) -> ()")


def _head_shape(packed: Tensor, heads: int) -> tuple[int, ...]:
    return (*packed.shape[:-1], heads, packed.shape[-1] // (3 * heads))


def _statistics(packed: Tensor, heads: int, rms: bool) -> tuple[Tensor, Tensor]:
    rstd = torch.empty((2, *_head_shape(packed, heads)[:-1]), dtype=torch.float32, device=packed.device)
    return torch.empty(0, dtype=torch.float32, device=packed.device) if rms else torch.empty_like(rstd), rstd


def _sizes(packed: Tensor, stride: int, heads: int) -> tuple[int, int, int, int]:
    """Tokens, heads, channels per head, distance between tokens."""
    return packed.numel() // packed.shape[-1], heads, packed.shape[-1] // (3 * heads), stride


def _launch_forward(
    packed: Tensor, stride: int, out: tuple[Tensor, ...], weights: tuple[Tensor | None, ...], heads: int, eps: float,
    statistics: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    module, where = native.target(packed)
    module.qk_norm_forward(
        native.address(packed), *([native.address(t) for t in out] or [0, 0, 0]),
        *native.pointer(weights[0]), *native.pointer(weights[1]), *map(native.address, statistics),
        _sizes(packed, stride, heads), native.DTYPE_CODE[packed.dtype], eps, where,
    )  # fmt: skip


def _forward(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool
) -> tuple[Tensor, ...]:
    outputs = _fake_forward(packed, q_weight, k_weight, heads, eps, rms)
    packed, stride = native.rows(packed)
    weights = tuple(None if w is None else w.contiguous() for w in (q_weight, k_weight))
    _launch_forward(packed, stride, outputs[:3], weights, heads, eps, (outputs[3], outputs[4]))
    return outputs


def _forward_in_place(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool
) -> None:
    dense, stride = native.rows(packed)
    weights = tuple(None if w is None else w.contiguous() for w in (q_weight, k_weight))
    _launch_forward(dense, stride, (), weights, heads, eps, _statistics(packed, heads, rms))
    if dense is not packed:
        packed.copy_(dense)


def _backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    mean: Tensor, rstd: Tensor, heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _fake_backward(grad_q, grad_k, grad_v, packed, q_weight, k_weight, mean, rstd, heads)
    packed, stride = native.rows(packed)
    upstream = [t.contiguous() for t in (grad_q, grad_k, grad_v)]
    weights = [None if w is None else w.contiguous() for w in (q_weight, k_weight)]
    module, where = native.target(packed)
    module.qk_norm_backward(
        *map(native.address, upstream), native.address(packed), native.address(grads[0]),
        *native.pointer(weights[0]), *native.pointer(weights[1]), native.address(mean), native.address(rstd),
        *native.pointer(grads[1]), *native.pointer(grads[2]),
        _sizes(packed, stride, heads), native.DTYPE_CODE[packed.dtype], where,
    )  # fmt: skip
    return grads


def _fake_forward(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool
) -> tuple[Tensor, ...]:
    shape = _head_shape(packed, heads)
    out = [torch.empty(shape, dtype=packed.dtype, device=packed.device) for _ in range(3)]
    return (*out, *_statistics(packed, heads, rms))


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    mean: Tensor, rstd: Tensor, heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def like(weight: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=packed.dtype, device=packed.device) if weight is None else torch.empty_like(weight)

    return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device), like(q_weight), like(k_weight)


def _fake_in_place(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool
) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    packed, q_weight, k_weight, ctx.heads, _eps, _rms = inputs
    ctx.save_for_backward(packed, q_weight, k_weight, *output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _differentiate(backward: Callable[..., Any], ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    packed, q_weight, k_weight, mean, rstd = ctx.saved_tensors
    grad_packed, grad_q_weight, grad_k_weight = backward(*grads[:3], packed, q_weight, k_weight, mean, rstd, ctx.heads)
    return (
        grad_packed,
        None if q_weight is None else grad_q_weight,
        None if k_weight is None else grad_k_weight,
        None, None, None,
    )  # fmt: skip


def _check(packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool) -> None:
    checks.qk_input(packed, heads, q_weight, k_weight, eps)
    checks.native_types(packed=packed, q_weight=q_weight, k_weight=k_weight)


def _check_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    mean: Tensor, rstd: Tensor, heads: int,
) -> None:  # fmt: skip
    _check(packed, q_weight, k_weight, heads, 0.0, False)
    shape = _head_shape(packed, heads)
    for name, grad in (("grad_q", grad_q), ("grad_k", grad_k), ("grad_v", grad_v)):
        checks.shaped(name, grad, shape, packed)
    checks.shaped("rstd", rstd, (2, *shape[:-1]), packed, torch.float32)
    checks.shaped("mean", mean, (2, *shape[:-1]) if mean.numel() else (0,), packed, torch.float32)


qk_norm = differentiable(
    "qk_norm",
    forward=_forward,
    backward=_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    check=_check,
    check_backward=_check_backward,
    setup_context=_setup_context,
    differentiate=_differentiate,
)


def _checked_in_place(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool
) -> None:
    _check(packed, q_weight, k_weight, heads, eps, rms)
    _forward_in_place(packed, native.plain(q_weight), native.plain(k_weight), heads, eps, rms)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("qk_norm_", _checked_in_place, _key)
torch.library.register_fake("vitruvius::qk_norm_", _fake_in_place, lib=LIBRARY)
