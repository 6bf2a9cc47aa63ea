"""Native LayerNorm and RMSNorm as torch operators: `vitruvius::norm` and `vitruvius::norm_backward`.

One operator serves both norms, with and without a residual sum in front: s = x + residual; y = norm(s) * weight + bias.
Kept for the backward pass: s (which is x where there is no residual) and one or two fp32 numbers per row; or,
memory-efficient, y in the
place of s, from which the normalised input is recovered as (y - bias) / weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, native
from .registry import LIBRARY, differentiable

LIBRARY.define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType out_dtype,"
    " bool memory_efficient) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)"
)
LIBRARY.define(
    "norm_backward(Tensor grad, Tensor saved, Tensor? grad_sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " ScalarType x_dtype, bool from_output) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    memory_efficient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty y, sum, mean, rstd. What this call does not make is empty of size 0."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty(0, dtype=torch.float32, device=x.device) if rms else torch.empty_like(rstd)
    return y, total, mean, rstd


def _fake_backward(
    grad: Tensor,
    saved: Tensor,
    grad_sum: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty(0 if p is None else p.shape, dtype=x_dtype if p is None else p.dtype, device=saved.device)
             for p in (weight, bias)]  # fmt: skip
    return torch.empty(saved.shape, dtype=x_dtype, device=saved.device), grads[0], grads[1]


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    memory_efficient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = outputs = _fake_forward(x, residual, weight, bias, eps, rms, out_dtype, memory_efficient)
    dim = x.shape[-1]
    x, stride = native.rows(x)
    residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    module, where = native.target(x)
    module.layer_norm_forward(
        x.data_ptr(), native.address(residual), native.address(total), y.data_ptr(),
        *native.pointer(weight), *native.pointer(bias), native.address(mean), rstd.data_ptr(),
        rstd.numel(), dim, stride, native.DTYPE_CODE[x.dtype], native.DTYPE_CODE[out_dtype], eps, where,
    )  # fmt: skip
    return outputs


def _backward(
    grad: Tensor,
    saved: Tensor,
    grad_sum: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = outputs = _fake_backward(
        grad, saved, grad_sum, weight, bias, mean, rstd, x_dtype, from_output
    )
    dim = saved.shape[-1]
    saved, stride = native.rows(saved)
    grad = grad.contiguous()
    grad_sum, weight, bias = (None if t is None else t.contiguous() for t in (grad_sum, weight, bias))
    module, where = native.target(grad)
    module.layer_norm_backward(
        grad.data_ptr(), saved.data_ptr(), native.address(grad_sum), grad_input.data_ptr(),
        *native.pointer(weight), *native.pointer(bias), native.address(mean), rstd.data_ptr(),
        *native.pointer(grad_weight), *native.pointer(grad_bias),
        rstd.numel(), dim, stride, native.DTYPE_CODE[x_dtype], native.DTYPE_CODE[grad.dtype], from_output, where,
    )  # fmt: skip
    return outputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _eps, _rms, _out_dtype, memory_efficient = inputs
    y, total, mean, rstd = output
    saved = y if memory_efficient else x if residual is None else total
    # from the output, the bias is needed again; else only its shape and type are
    ctx.save_for_backward(saved, weight, bias, mean, rstd)
    ctx.x_dtype, ctx.memory_efficient, ctx.has_residual = x.dtype, memory_efficient, residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(
    backward: Callable[..., Any], ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, _mean: None, _rstd: None
) -> tuple[Tensor | None, ...]:
    saved, weight, bias, mean, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_sum = None
    if grad is None:  # only the sum was used
        return grad_sum, grad_sum, None, None, None, None, None, None
    grad_input, grad_weight, grad_bias = backward(
        grad, saved, grad_sum, weight, bias, mean, rstd, ctx.x_dtype, ctx.memory_efficient
    )
    return (
        grad_input,
        grad_input if ctx.has_residual else None,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None, None, None, None,
    )  # fmt: skip


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    memory_efficient: bool,
) -> None:
    checks.norm_input(x, weight, bias, eps)
    checks.native_types(x=x, weight=weight, bias=bias)
    if residual is not None:
        checks.like("residual", residual, "x", x)
    if out_dtype not in native.DTYPE_CODE or {x.dtype, out_dtype} == {torch.bfloat16, torch.float16}:
        raise ValueError(f"out_dtype: there is no native kernel from {x.dtype} to {out_dtype}")


def _check_backward(
    grad: Tensor,
    saved: Tensor,
    grad_sum: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    from_output: bool,
) -> None:
    checks.norm_input(saved, weight, bias, 0.0)
    checks.native_types(grad=grad, saved=saved, weight=weight, bias=bias)
    checks.shaped("grad", grad, saved.shape, saved, grad.dtype)
    if grad_sum is not None:
        checks.shaped("grad_sum", grad_sum, saved.shape, saved, x_dtype)
    checks.shaped("rstd", rstd, saved.shape[:-1], saved, torch.float32)
    checks.shaped("mean", mean, saved.shape[:-1] if mean.numel() or not rstd.numel() else (0,), saved, torch.float32)
    if saved.dtype != (grad.dtype if from_output else x_dtype):
        raise ValueError(f"saved: dtype {saved.dtype} is neither that of the input nor of the output")


norm = differentiable(
    "norm",
    forward=_forward,
    backward=_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    check=_check,
    check_backward=_check_backward,
    setup_context=_setup_context,
    differentiate=_differentiate,
)
