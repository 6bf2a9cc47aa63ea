"""The autograd nodes of parallel.tensor.linear with their three products in 8 bits; gathers and sums are the same.

Legend: R rows, D input width, F output width, T tensor-parallel size. Kept for backward: the input in 8 bits (1 byte
per element), and the step's 8-bit weight. The output gradient is cast once, for both of its products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.fp8.backend import Fp8Backend, choose_backend
from parallel.fp8.quantise import Quantised, aligned
from parallel.fp8.recipe import Fp8Recipe
from parallel.fp8.state import Fp8Registry, Fp8State
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from parallel.tensor.rows import TensorParallel, sum_start
from parallel.tensor.weight_grad import GradientSink


def _weight_gradient(weight: Tensor, backend: Fp8Backend, grad: Quantised, x: Quantised) -> Tensor | None:
    """As parallel.tensor.weight_grad.weight_gradient: the gradient [F, D], or None if the weight's sink took it."""
    sink: GradientSink | None = getattr(weight, "vitruvius_sink", None)
    if sink is None:
        return backend.weight_gradient(grad, x, weight.dtype)
    assert isinstance(weight, nn.Parameter)
    sink.add_computed(weight, lambda: backend.weight_gradient(grad, x, torch.float32))
    return None


def _keep(ctx: Any, fp8: Fp8State, x: Quantised, weight: Tensor, weight8: Quantised) -> None:
    # The input goes through save_for_backward, where activation recomputation can drop it. The weight outlives this
    # node anyway, and so does its 8-bit form where it is kept.
    ctx.save_for_backward(*x.save())
    ctx.shell, ctx.fp8, ctx.weight = x.emptied(), fp8, weight
    ctx.weight8 = weight8 if fp8.registry.keep_weights else None


def _weight8(ctx: Any) -> Quantised:
    kept: Quantised | None = ctx.weight8
    return ctx.fp8.quantise_weight(ctx.weight, ctx.tp.axis, record=False) if kept is None else kept  # forward did


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fp8: Fp8State, tp: TensorParallel,
        gathered: Tensor | None, record: bool,
    ) -> Tensor:  # fmt: skip
        full = x if gathered is None else gathered
        x8 = fp8.quantise("input", full, None, record=record)  # each rank has all of it
        weight8 = fp8.quantise_weight(weight, tp.axis, record=record)
        y = fp8.backend.forward(x8, weight8, x.dtype)
        _keep(ctx, fp8, x8, weight, weight8)
        ctx.tp, ctx.split = tp, gathered is not None
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), backend, pending = grads, ctx.fp8.backend, None
        grad8 = ctx.fp8.quantise("grad", grad, ctx.tp.axis)
        if ctx.needs_input_grad[0]:
            grad_x = backend.input_gradient(grad8, _weight8(ctx), grad.dtype)
            pending = sum_start(grad_x, ctx.tp, ctx.split)
        x8 = ctx.shell.restore(ctx.saved_tensors)
        grad_weight = _weight_gradient(ctx.weight, backend, grad8, x8) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return pending.wait() if pending else None, grad_weight, grad_bias, None, None, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fp8: Fp8State, tp: TensorParallel, split: bool,
        record: bool,
    ) -> Tensor:  # fmt: skip
        x8 = fp8.quantise("input", x, tp.axis, record=record)
        weight8 = fp8.quantise_weight(weight, tp.axis, record=record)
        out = sum_start(fp8.backend.forward(x8, weight8, x.dtype), tp, split).wait()
        _keep(ctx, fp8, x8, weight, weight8)
        ctx.tp, ctx.split, ctx.rows = tp, split, x.shape[0]
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), backend = grads, ctx.fp8.backend
        full = comm.all_gather_rows(grad, ctx.tp.axis)[: ctx.rows] if ctx.split else grad
        grad8 = ctx.fp8.quantise("grad", full, None)  # each rank has all of it
        grad_x = backend.input_gradient(grad8, _weight8(ctx), grad.dtype) if ctx.needs_input_grad[0] else None
        x8 = ctx.shell.restore(ctx.saved_tensors)
        grad_weight = _weight_gradient(ctx.weight, backend, grad8, x8) if ctx.needs_input_grad[1] else None
        # With split rows each rank sums its own rows only: the bias is marked partial_over_tensor.
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


class Fp8Products:
    """In 8 bits: a linear's `Products`."""

    def __init__(self, state: Fp8State) -> None:
        self.state = state

    def column(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, gathered: Tensor | None = None
    ) -> Tensor:
        """As parallel.tensor.linear.Products."""
        y: Tensor = _ColumnParallel.apply(x, weight, bias, self.state, tp, gathered, torch.is_grad_enabled())
        return y

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, split: bool) -> Tensor:
        """As parallel.tensor.linear.Products."""
        y: Tensor = _RowParallel.apply(x, weight, bias, self.state, tp, split, torch.is_grad_enabled())
        return y


def enable_fp8(
    modules: Iterable[nn.Module],
    *,
    recipe: Fp8Recipe,
    device: torch.device,
    backend: str = "auto",
    keep_weights: bool = True,
    skip: Callable[[str], bool] = lambda name: False,
) -> Fp8Registry:
    """Give every column- and row-parallel linear of `modules` 8-bit products, except those whose name is skipped.

    Args:
        modules: all that this rank runs, so that `finish_step` is called once; no name is in two of them.
        skip: e.g. the classifier, by name.
        keep_weights: as in Fp8Registry.

    Raises:
        ValueError: the backend or the device cannot do it.
    """
    linears = {
        name: layer
        for module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear) and not skip(name)
    }
    registry = Fp8Registry(
        list(linears), recipe=recipe, backend=choose_backend(backend, device), device=device, keep_weights=keep_weights
    )
    for name, layer in linears.items():
        layer.products = Fp8Products(registry.states[name])
        if keep_weights:
            registry.weight_bytes += 2 * prod(map(aligned, layer.weight.shape))
    return registry
