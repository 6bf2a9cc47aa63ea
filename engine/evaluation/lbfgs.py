"""L-BFGS for a smooth convex function whose vector is shared out over ranks.

Every vector (the point, gradients, the history) is cut into as many parts as there are ranks, and all that must be
known of them is their inner products, added up over ranks: so a rank holds a share of the 2m + 1 vectors of history,
and all ranks go the same way whatever their processors round. The direction is a sum of those vectors, whose factors
come from the matrix of inner products alone (Chen, Wang and Zhou 2014, "Large-scale L-BFGS using MapReduce").

The step is found by bisection for the weak Wolfe conditions (Lewis and Overton 2013), which keep the history positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import mul

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis

Objective = Callable[[Tensor], tuple[float, Tensor]]
"""This rank's part of a point -> (value of the function, this rank's part of its gradient). Collective."""
_DECREASE, _CURVATURE, _TRIES = 1e-4, 0.9, 40


@dataclass(frozen=True)
class Minimum:
    """point: this rank's part. converged: whether the gradient was small enough. iterations, calls: of the function."""

    point: Tensor
    value: float
    gradient_max: float
    converged: bool
    iterations: int
    calls: int


def minimise(
    function: Objective, start: Tensor, axis: Axis, *, tolerance: float, iterations: int = 1000, history: int = 10
) -> Minimum:
    """From this rank's part of a point to that of the minimum. Collective.

    Args:
        start: fp64 [p]. tolerance: the largest element of the gradient that may be left. history: pairs that are kept.
    """
    state = _State(axis, history)
    x, (value, gradient) = start, function(start)
    calls, done = 1, 0
    while (largest := _largest(gradient, axis)) > tolerance and done < iterations:
        direction, slope = state.direction(gradient)
        found = _search(function, x, value, direction, slope, axis, first=1.0 if state.pairs else min(1.0, 1 / largest))
        calls += found.calls
        if not found.moved:
            break  # no step decreases it any more: rounding
        state.add(found.point - x, found.gradient - gradient)
        x, value, gradient = found.point, found.value, found.gradient
        done += 1
    return Minimum(x, value, largest, largest <= tolerance, done, calls)


@dataclass
class _State:
    """The last steps and what they changed the gradient by."""

    axis: Axis
    history: int
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, step: Tensor, change: Tensor) -> None:
        if _dot(step, change, self.axis) > 0:
            self.pairs = [*self.pairs, (step, change)][-self.history :]

    def direction(self, gradient: Tensor) -> tuple[Tensor, float]:
        """(this rank's part of it, its inner product with the gradient), from one matrix of inner products."""
        basis = torch.stack([*(s for s, _ in self.pairs), *(y for _, y in self.pairs), gradient])  # [2m + 1, p]
        products: list[list[float]] = comm.all_reduce(basis @ basis.T, self.axis).tolist()
        factors = _factors(products, len(self.pairs))
        slope = sum(map(mul, factors, products[-1]))
        return basis.new_tensor(factors) @ basis, slope


def _factors(products: Sequence[Sequence[float]], m: int) -> list[float]:
    """The two loops of L-BFGS over factors of the m steps, the m changes and the gradient, in place of vectors.

    In plain numbers, whose sums no processor orders in its own way.
    """
    factors, alpha = [0.0] * (2 * m) + [-1.0], [0.0] * m
    for i in reversed(range(m)):
        alpha[i] = sum(map(mul, factors, products[i])) / products[i][m + i]
        factors[m + i] -= alpha[i]
    if m:
        scale = products[m - 1][2 * m - 1] / products[2 * m - 1][2 * m - 1]
        factors = [factor * scale for factor in factors]
    for i in range(m):
        factors[i] += alpha[i] - sum(map(mul, factors, products[m + i])) / products[i][m + i]
    return factors


@dataclass(frozen=True)
class _Step:
    point: Tensor
    value: float
    gradient: Tensor
    calls: int
    moved: bool


def _search(
    function: Objective, x: Tensor, value: float, direction: Tensor, slope: float, axis: Axis, *, first: float
) -> _Step:
    """A step along `direction` that decreases the function, and its slope, enough."""
    low, high, t = 0.0, float("inf"), first
    for calls in range(1, _TRIES + 1):
        point = x + t * direction
        there, gradient = function(point)
        if not there <= value + _DECREASE * t * slope:  # NaN, too
            high = t
        elif _dot(gradient, direction, axis) < _CURVATURE * slope:
            low = t
        else:
            return _Step(point, there, gradient, calls, moved=True)
        t = (low + high) / 2 if high < float("inf") else 2 * low
    return _Step(point, there, gradient, calls, moved=there < value)


def _dot(a: Tensor, b: Tensor, axis: Axis) -> float:
    return comm.all_reduce(torch.dot(a, b)[None], axis).item()


def _largest(x: Tensor, axis: Axis) -> float:
    own = x.abs().amax() if x.numel() else x.new_zeros(())
    return comm.all_reduce(own[None], axis, "max").item()
