"""Runs one layer by itself, forward and backward, and counts the bytes that it makes while they live.

It is the engine's own layer, as an assembly on the meta device has it, between two stubs: what the layer before it
gives out is made here, and so is the gradient that the layer behind it sends back. A tensor between two layers is
counted with the later one, which alone knows whether it keeps it, and a gradient with the one that it comes to. So
costs of layers add up to what a stage of them holds, whatever the save sets of their neighbours.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from engine.live_bytes import LiveBytes
from engine.recompute.costs import LayerCost
from parallel.sharding.gradients import GradientSync

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""
Ride = tuple[tuple[int, ...], torch.dtype, bool]
"""Shape, dtype, and whether a gradient is due."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a layer's cost depends on beside the layer.

    Attributes:
        given: shape and dtype of its input; None for the first layer of a tower. carries: whether a gradient of it is
            due. rides: what rides beside its input, if anything. reads: whether it reads that. ridden: whether its
            output is to ride.
        first, last: of its stage, which holds what it has received until its backward is over: the input where it
            carries a gradient, the gradient of the output.
        shares: whether the layer behind keeps its input, so that what this one keeps of its output is that one's.
        splits: whether backward comes in two parts. notes: whether what is to be computed again is noted, for a
            schedule that recomputes (R). ahead: whether an R runs it: the cost is from there on, as if that were the
            forward. arises: whether the layer is in the stage whose output the ride is. joined: whether that is which
            reads it.
    """

    given: Form | None
    carries: bool = True
    rides: tuple[Ride, ...] = ()
    reads: bool = False
    ridden: bool = False
    first: bool = False
    last: bool = False
    shares: bool = False
    splits: bool = False
    notes: bool = False
    ahead: bool = False
    arises: bool = False
    joined: bool = False

    @property
    def waits(self) -> bool:
        """Whether its output has been sent as a ride, with which its gradient comes."""
        return self.ridden and not self.last and not self.joined


def measure(
    layer: Callable[[Tensor | None, tuple[Tensor, ...]], Tensor],
    place: Place,
    gradients: GradientSync,
    noting: Callable[[], AbstractContextManager[list[Callable[[], None]]]],
    sent: Callable[[], int] = lambda: 0,
) -> LayerCost:
    """What a layer holds, for one micro-batch.

    Args:
        layer: its input, and the rides that it reads, to its output or, of the last layer of all, to the loss.
            gradients: of its weights, go there.
        noting: within, what is to be computed again is noted. sent: has let go of what was sent to host memory; bytes.
    """
    gradients.start(1)
    with LiveBytes() as counter:
        x = _input(place.given, carries=place.carries, from_stage=not place.first)
        rides = tuple(_input((s, d), carries=c, from_stage=place.arises) for s, d, c in place.rides * place.reads)
        with noting() if place.notes else nullcontext(list[Callable[[], None]]()) as dropped:
            y: Tensor | None = layer(x, rides)  # type: ignore[arg-type]
        forward = counter.restart()
        assert y is not None
        root, gradient = _root(y, place)
        output = y.untyped_storage()
        size, memory = output.nbytes(), weakref.ref(output)
        y, away = None, sent()
        del output
        x = x if place.first and place.carries else None
        rides = () if place.arises else tuple(ride for ride in rides if ride is not None and ride.requires_grad)
        kept = counter.now
        if place.shares and not (place.last or place.waits) and memory() is not None:
            kept -= size
        if root is None:
            forward = kept if place.ahead else forward  # nothing of it is run again
            return with_rides(LayerCost(kept=kept, forward=forward, backward=0, away=away), place)
        if place.ahead:
            counter.restart()
            _run_all(dropped)
            forward, kept = counter.restart(), counter.now
        dropped.clear()
        with gradients.deferring() if place.splits else nullcontext() as products:
            given = [gradient()]
            torch.autograd.backward([root], given)
        backward = counter.restart()
        x = root = None
        held = counter.now
        given.clear()
        rides = ()
        deferred = counter.now
        counter.restart()
        while products:
            products.pop(0)()  # lets go of what it multiplies
        weight = counter.peak - deferred
    cost = LayerCost(
        kept=kept, forward=forward, backward=backward, deferred=deferred, weight=weight, held=held - deferred, away=away
    )
    return with_rides(cost, place)


def with_rides(cost: LayerCost, place: Place) -> LayerCost:
    """The cost, and what rides past the layer meanwhile.

    That is alive while any layer of its stage that it passes runs forward. Its gradient is there while they run
    backward: it came with that of the last layer's output, or the layer that reads it has given it already. (Where that
    has it from the stage's inputs, both stay to the end, and are what it is measured to hold.)
    """
    if not place.rides or place.reads:
        return cost
    size = 0 if place.ahead else sum(_size(shape, dtype) for shape, dtype, _ in place.rides)
    gradient = sum(_size(shape, dtype) for shape, dtype, carries in place.rides if carries)
    gradient = gradient if place.arises or not place.joined else 0
    return replace(cost, forward=cost.forward + size, backward=cost.backward + gradient)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _run_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
    calls.clear()


def _input(given: Form | None, *, carries: bool, from_stage: bool) -> Tensor | None:
    """As the layer is given it: by a layer of its stage, or as the stage is."""
    if given is None:
        return None
    shape, dtype = given
    if carries and from_stage:
        x: Tensor = _Before.apply(torch.empty(0, device="meta", requires_grad=True), shape, dtype)
        return x
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=carries)


def _root(y: Tensor, place: Place) -> tuple[Any, Callable[[], Tensor | None]]:
    """Where backward begins (None: nowhere), and the gradient that it begins with."""
    if not y.requires_grad:
        return None, lambda: None
    if y.dim() == 0:
        return get_gradient_edge(y), lambda: None
    if place.last or place.waits:
        shape, dtype = y.shape, y.dtype
        return get_gradient_edge(y), lambda: torch.empty(shape, dtype=dtype, device="meta")
    root = _Behind.apply(y)
    return get_gradient_edge(root), lambda: torch.empty(0, device="meta")


class _Before(torch.autograd.Function):
    """The layer before: gives out its output, and lets go of the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return None, None, None


class _Behind(torch.autograd.Function):
    """The layer behind: keeps nothing, and sends back a gradient that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.form = y.shape, y.dtype
        return torch.empty(0, device="meta")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        shape, dtype = ctx.form
        return torch.empty(shape, dtype=dtype, device="meta")
