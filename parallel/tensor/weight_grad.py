"""Weight gradients as a step of their own, which a schedule may put off and which go straight into the gradient buffer.

In autograd's backward a linear layer computes the gradient of its input, which the previous stage waits for, and
leaves its weight gradient, which nobody waits for, to `weight_gradient`. A parameter with a sink (the engine's fp32
gradient buffer) has the product added in place, with no temporary of the weight's size; one without gets an ordinary
gradient back. Splitting the two is what zero-bubble schedules need (Qi et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from parallel.tensor import products


class GradientSink(Protocol):
    """Where a parameter's gradient is accumulated."""

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        """Add grad_output' x to the gradient of `parameter`, now or when the schedule says. [R, F], [R, D] ->
        [F, D].
        """

    def add_computed(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        """Add what `product` gives, [F, D], to the gradient of `parameter`, now or when the schedule says."""


def attach_sink(parameter: nn.Parameter, sink: GradientSink) -> None:
    """Send the matrix-product gradients of `parameter` to `sink` from now on."""
    parameter.vitruvius_sink = sink  # type: ignore[attr-defined]


def weight_gradient(weight: Tensor, grad_output: Tensor, x: Tensor) -> Tensor | None:
    """Gradient [F, D] of `weight` from grad_output [R, F] and input x [R, D]; None if the weight's sink took it."""
    sink: GradientSink | None = getattr(weight, "vitruvius_sink", None)
    if sink is None:
        return products.weight_gradient(grad_output, x)
    assert isinstance(weight, nn.Parameter)
    sink.add_product(weight, grad_output, x)
    return None


def computed_gradient(weight: Tensor, product: Callable[[], Tensor]) -> Tensor | None:
    """What `product` gives, as the gradient of `weight`, in its format; None if the weight's sink took it, which may
    call `product` later."""
    sink: GradientSink | None = getattr(weight, "vitruvius_sink", None)
    if sink is None:
        return product().to(weight.dtype)
    assert isinstance(weight, nn.Parameter)
    sink.add_computed(weight, product)
    return None
