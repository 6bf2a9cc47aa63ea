"""The `vitruvius` operator library, and how a native kernel becomes a differentiable operator of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import plain

LIBRARY = torch.library.Library("vitruvius", "DEF")


def differentiable(
    name: str,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    check: Callable[..., None],
    check_backward: Callable[..., None],
    setup_context: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """Implements `vitruvius::name` and `vitruvius::name_backward` (already defined), and returns what calls them.

    A plain tensor outside a compiler goes to an autograd.Function that calls the kernel itself: the dispatcher and
    registered autograd of torch.library take about 50 microseconds more per forward and backward, as long as a small
    LayerNorm. Compilers, fake and meta tensors see the operator. Gradients of gradients are refused either way.

    Args:
        name: of the operator.
        forward, backward: run the kernels on real tensors.
        fake_forward, fake_backward: the same arguments, empty outputs.
        check, check_backward: the same arguments; raise ValueError for what the kernels would read beyond. They are for
            whoever calls torch.ops.vitruvius: `Kernels` has checked before it chooses a form.
        setup_context: (ctx, inputs, output), as torch.library.register_autograd wants it.
        differentiate: (backward, ctx, *grads) -> a gradient or None for each argument of forward.
    """
    operator = f"vitruvius::{name}"
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _checked(check, forward), key)
        LIBRARY.impl(f"{name}_backward", _checked(check_backward, backward), key)
    torch.library.register_fake(operator, fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"{operator}_backward", fake_backward, lib=LIBRARY)
    call, call_backward = getattr(torch.ops.vitruvius, name), getattr(torch.ops.vitruvius, f"{name}_backward")

    def differentiate_operator(ctx: Any, *grads: Tensor) -> Any:
        return differentiate(call_backward, ctx, *grads)

    torch.library.register_autograd(operator, differentiate_operator, setup_context=setup_context, lib=LIBRARY)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            args = tuple(map(plain, args))
            outputs = forward(*args)
            setup_context(ctx, args, outputs)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return differentiate(backward, ctx, *map(plain, grads))

    def choose(x: Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter):
            return call(x, *args)
        return Direct.apply(x, *args)

    return choose


def _checked(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        args = tuple(map(plain, args))
        check(*args)
        return function(*args)

    return run
