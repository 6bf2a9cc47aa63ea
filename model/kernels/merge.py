"""Native 2x2 patch merge + LayerNorm as torch operators. Kept for the backward pass: x and two fp32 numbers per merged
token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, native
from .registry import LIBRARY, differentiable

LIBRARY.define("patch_merge(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)")
LIBRARY.define(
    "patch_merge_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def _merged_sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = outputs = _fake_forward(x, weight, bias, eps)
    x = x.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    module, where = native.target(x)
    module.patch_merge_forward(
        native.address(x), native.address(y), *native.pointer(weight), *native.pointer(bias),
        native.address(mean), native.address(rstd), _merged_sizes(x), native.DTYPE_CODE[x.dtype], eps, where,
    )  # fmt: skip
    return outputs


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = grads = _fake_backward(grad, x, weight, bias, mean, rstd)
    grad, x = grad.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    module, where = native.target(x)
    module.patch_merge_backward(
        native.address(grad), native.address(x), native.address(grad_input), *native.pointer(weight),
        native.address(mean), native.address(rstd), *native.pointer(grad_weight), *native.pointer(grad_bias),
        _merged_sizes(x), native.DTYPE_CODE[x.dtype], where,
    )  # fmt: skip
    return grads


def _fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, channels = _merged_sizes(x)
    y = torch.empty(batch, height, width, 4 * channels, dtype=x.dtype, device=x.device)
    mean = torch.empty(batch, height, width, dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def like(p: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=x.dtype, device=x.device) if p is None else torch.empty_like(p)

    return torch.empty(x.shape, dtype=x.dtype, device=x.device), like(weight), like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _eps = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(backward: Callable[..., Any], ctx: Any, grad: Tensor, *_rest: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grads = backward(grad, x, weight, bias, mean, rstd)
    return grads[0], None if weight is None else grads[1], None if bias is None else grads[2], None


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    checks.merge_input(x, weight, bias, eps)
    checks.native_types(x=x, weight=weight, bias=bias)


def _check_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> None:
    _check(x, weight, bias, 0.0)
    batch, height, width, channels = _merged_sizes(x)
    checks.shaped("grad", grad, (batch, height, width, 4 * channels), x)
    for name, value in (("mean", mean), ("rstd", rstd)):
        checks.shaped(name, value, (batch, height, width), x, torch.float32)


patch_merge = differentiable(
    "patch_merge",
    forward=_forward,
    backward=_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    check=_check,
    check_backward=_check_backward,
    setup_context=_setup_context,
    differentiate=_differentiate,
)
