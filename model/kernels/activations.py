"""Native bias + GELU as torch operators. Kept for the backward pass: x and the bias.

x may be a slice of the output of a matrix product, and the result lie beside another tensor, as the input of the next
(ViT-22B's parallel block): x is read, and the result written, in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, native
from .registry import LIBRARY, differentiable

FORMS = {"none": 0, "tanh": 1, "quick": 2}
"""Of GELU, by the names that users give them, as csrc/cpu/types.h numbers them."""

LIBRARY.define("bias_gelu(Tensor x, Tensor? bias, int form, Tensor? beside=None) -> Tensor")
LIBRARY.define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, int form) -> (Tensor grad_input, Tensor grad_bias)"
)


def _empty(x: Tensor, beside: Tensor | None = None) -> Tensor:
    width = x.shape[-1] + (0 if beside is None else beside.shape[-1])
    return torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _forward(x: Tensor, bias: Tensor | None, form: int, beside: Tensor | None = None) -> Tensor:
    whole = y = _empty(x, beside)
    if beside is not None:
        left = beside.shape[-1]
        whole[..., :left].copy_(beside)
        y = whole[..., left:]
    (x, x_stride), (y, y_stride), bias = native.rows(x), native.rows(y), None if bias is None else bias.contiguous()
    module, where = native.target(x)
    module.gelu_forward(
        native.address(x), x_stride, *native.pointer(bias), native.address(y), y_stride, *_rows(x),
        native.DTYPE_CODE[x.dtype], form, where,
    )  # fmt: skip
    return whole


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, form: int) -> tuple[Tensor, Tensor]:
    grad_input, grad_bias = grads = _fake_backward(grad, x, bias, form)
    (grad, grad_stride), (x, x_stride) = native.rows(grad), native.rows(x)
    bias = None if bias is None else bias.contiguous()
    module, where = native.target(x)
    module.gelu_backward(
        native.address(grad), grad_stride, native.address(x), x_stride, *native.pointer(bias),
        native.address(grad_input), *native.pointer(grad_bias), *_rows(x), native.DTYPE_CODE[x.dtype], form, where,
    )  # fmt: skip
    return grads


def _fake_forward(x: Tensor, bias: Tensor | None, form: int, beside: Tensor | None = None) -> Tensor:
    return _empty(x, beside)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None, form: int) -> tuple[Tensor, Tensor]:
    return _empty(x), torch.empty(0, dtype=x.dtype, device=x.device) if bias is None else torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.form, beside = inputs
    ctx.left = 0 if beside is None else beside.shape[-1]
    ctx.save_for_backward(x, bias)


def _differentiate(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_input, grad_bias = backward(grad[..., ctx.left :], x, bias, ctx.form)
    return grad_input, None if bias is None else grad_bias, None, grad[..., : ctx.left] if ctx.left else None


def _check(x: Tensor, bias: Tensor | None, form: int, beside: Tensor | None = None) -> None:
    if form not in FORMS.values():
        raise ValueError(f"form: {form} is not one of {', '.join(map(str, FORMS.values()))}")
    checks.gelu_input(x, bias, "none", beside)
    checks.native_types(x=x, bias=bias)


def _check_backward(grad: Tensor, x: Tensor, bias: Tensor | None, form: int) -> None:
    _check(x, bias, form)
    checks.shaped("grad", grad, x.shape, x)


bias_gelu = differentiable(
    "bias_gelu",
    forward=_forward,
    backward=_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    check=_check,
    check_backward=_check_backward,
    setup_context=_setup_context,
    differentiate=_differentiate,
)
