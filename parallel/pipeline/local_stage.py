"""One stage on this rank: its forward and backward of a micro-batch, and what it keeps in between.

A stage reads its inputs, and the gradients of its outputs, from an `Inbox`, and lays its results out by micro-batch:
in the inbox of a neighbour on the same rank, or where the executor finds what it has to send. It knows no rank.

What is kept per micro-batch between forward and backward: the stage's inputs, and the edge of the autograd graph at its
outputs, and what is to be called to recompute, which holds no tensor. Between the two parts of a split backward: the
products that were put off, with what they multiply. The outputs are freed once they are sent. Of an input that is an
output, too, nothing is kept: the gradient that comes for the one is that of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.pipeline.actions import ActionKind
from parallel.pipeline.boundary import Specs
from parallel.pipeline.lanes import Lane

Tensors = tuple[Tensor, ...]
Products = list[Callable[[], None]]
Head = Callable[[Tensors, Any], Tensor]
"""Outputs of the last stage and its micro-batch -> the scalar to differentiate, or whatever is to be returned."""


class StageModule(Protocol):
    """One pipeline stage."""

    def __call__(self, inputs: list[Tensor], micro_batch: Any) -> Tensors:
        """Inputs of the boundary before (none for the first stage) -> outputs of the boundary after.

        The list is the stage's: it may empty it, to let go of what it has used.
        """


class Deferrer(Protocol):
    """Who can put off weight gradients (parallel.sharding.gradients.GradientSync)."""

    def deferring(self) -> AbstractContextManager[Products]:
        """Put off products within; the list is called later."""

    def hold(self, order: Sequence[int]) -> None:
        """Start no reduction that ends a step before `release`, and then in this order of stages, which go by their
        place on this rank.
        """

    def release(self) -> None:
        """Start what was held, as far as it is complete and in its turn."""


class Recomputer(Protocol):
    """Who can compute again what a stage's forward drops."""

    def noting(self) -> AbstractContextManager[Products]:
        """Note what is dropped within: to call the list in order, once, is to compute it again."""


class Inbox:
    """Tensors by micro-batch, handed over on this rank or out of a lane.

    Args:
        lane: that brings them, None where the neighbour is on this rank. order: of the micro-batches in it.
        arrived: is called when something was taken out of the lane for who asked.

    Attributes:
        here: what has come and was not taken.
    """

    __slots__ = ("_arrived", "_coming", "here", "lane", "order")

    def __init__(self, lane: Lane | None, order: Sequence[int], arrived: Callable[[], None]) -> None:
        self.lane, self.order, self.here = lane, tuple(order), dict[int, Tensors]()
        self._arrived = arrived
        self.begin()

    def begin(self) -> None:
        """Another pass over the schedule."""
        self.here.clear()
        self._coming: Iterator[int] = iter(self.order)

    def take(self, m: int) -> Tensors:
        """Those of micro-batch m; waits for them, and for what the lane brings before them."""
        if m not in self.here:
            while m not in self.here:
                self.fetch()
            self._arrived()
        return self.here.pop(m)

    def fetch(self) -> None:
        """Take the next message out of the lane, if there is one; waits for it."""
        assert self.lane is not None, "nobody on this rank has made what is needed"
        self.here[next(self._coming)] = self.lane.take()


@dataclass(frozen=True, slots=True)
class _Kept:
    """What one micro-batch keeps between forward and backward.

    Attributes:
        inputs: those that carry a gradient; in the place of one that is an output, too, the number of that among those
            that carry one. roots: of the outputs that carry one, None where nothing that is trained, here or before,
            has made it, or where it is an input.
    """

    inputs: Sequence[Tensor | int]
    roots: Sequence[GradientEdge | None]


class LocalStage:
    """Runs one stage.

    Args:
        module: the stage. inputs: where those come from, None for the first stage, and specs of their boundary.
        gradients: where those of the outputs come from, None for the last stage, and specs of their boundary.
        outputs, input_gradients: where results are laid out.
        deferrer: puts off weight gradients where the backward is split. recomputer: where the schedule recomputes.
    """

    def __init__(
        self,
        module: StageModule,
        *,
        inputs: Inbox | None,
        gradients: Inbox | None,
        boundary_before: Specs,
        boundary_after: Specs,
        outputs: dict[int, Tensors],
        input_gradients: dict[int, Tensors],
        deferrer: Deferrer | None,
        recomputer: Recomputer | None = None,
    ) -> None:
        self.module, self.deferrer, self.recomputer = module, deferrer, recomputer
        self.inputs, self.gradients = inputs, gradients
        self.outputs, self.input_gradients = outputs, input_gradients
        self._carrying_in = [i for i, spec in enumerate(boundary_before) if spec.carries_gradient]
        self._carrying_out = [i for i, spec in enumerate(boundary_after) if spec.carries_gradient]
        self._kept: dict[int, _Kept] = {}
        self._products: dict[int, Products] = {}
        self._dropped: dict[int, Products] = {}

    def method(self, kind: ActionKind) -> Callable[[int], None]:
        """What runs an action of this kind. Raises KeyError where nothing does."""
        return {
            ActionKind.FORWARD: self.forward,
            ActionKind.BACKWARD: self.backward,
            ActionKind.BACKWARD_INPUT: self.backward_input,
            ActionKind.BACKWARD_WEIGHT: self.backward_weight,
            ActionKind.RECOMPUTE: self.recompute,
        }[kind]

    def begin(self, micro_batches: Sequence[Any], head: Head, *, trains: bool) -> None:
        """Another pass over the schedule. What a pass that was broken off has left is dropped."""
        self._micro_batches, self._head, self._trains = micro_batches, head, trains
        self._results: dict[int, Tensor] = {}
        for held in (self._kept, self._products, self._dropped, self.outputs, self.input_gradients):
            held.clear()
        for inbox in (self.inputs, self.gradients):
            if inbox is not None:
                inbox.begin()

    def end(self) -> list[Tensor]:
        """What `head` returned for each micro-batch, detached; nothing but on the last stage."""
        inboxes = [inbox.here for inbox in (self.inputs, self.gradients) if inbox is not None]
        left = [self._kept, self._products, self._dropped, self.outputs, self.input_gradients, *inboxes]
        assert not any(left), "the schedule left tensors behind"
        self._micro_batches = ()
        return [self._results[m] for m in sorted(self._results)]

    def forward(self, m: int) -> None:
        """Outputs of micro-batch m, or its loss."""
        inputs = list(self.inputs.take(m)) if self.inputs is not None else []
        carrying = tuple([inputs[i] for i in self._carrying_in]) if self._trains else ()
        for x in carrying:
            x.requires_grad_()
        outputs = self._run(inputs, m)
        if self.gradients is None:
            result = self._head(outputs, self._micro_batches[m])
            self._results[m] = result.detach()
            roots: Sequence[Tensor] = (result,)
        else:
            self.outputs[m] = tuple([x.detach() for x in outputs])
            roots = [outputs[i] for i in self._carrying_out]
        if self._trains:
            passed = {id(x): i for i, x in enumerate(roots)} if carrying else {}
            kept = [passed.get(id(x), x) for x in carrying]
            edges = [get_gradient_edge(x) if x.requires_grad else None for x in roots]
            for i in kept:
                if isinstance(i, int):
                    edges[i] = None
            self._kept[m] = _Kept(kept, edges)

    def _run(self, inputs: list[Tensor], m: int) -> Tensors:
        if self.recomputer is None or not self._trains:
            return self.module(inputs, self._micro_batches[m])
        with self.recomputer.noting() as self._dropped[m]:
            return self.module(inputs, self._micro_batches[m])

    def recompute(self, m: int) -> None:
        """What the forward has dropped, if anything."""
        for again in self._dropped.pop(m, ()):
            again()

    def backward(self, m: int) -> None:
        """Gradients of the inputs and of the weights."""
        self._dropped.pop(m, None)
        kept = self._kept.pop(m)
        gradients = self.gradients.take(m) if self.gradients is not None else (None,)
        roots = [(root, x) for root, x in zip(kept.roots, gradients, strict=True) if root is not None]
        if roots:
            edges, arrived = zip(*roots, strict=True)
            torch.autograd.backward(edges, arrived)
        if self.inputs is not None:
            self.input_gradients[m] = tuple([_gradient_of(x, gradients) for x in kept.inputs])

    def backward_input(self, m: int) -> None:
        """Gradients of the inputs alone."""
        assert self.deferrer is not None, "a schedule that splits the backward needs a deferrer"
        with self.deferrer.deferring() as products:
            self.backward(m)
        self._products[m] = products

    def backward_weight(self, m: int) -> None:
        """Gradients of the weights, which `backward_input` has put off."""
        products = self._products.pop(m)
        products.reverse()
        while products:  # each is let go, with what it multiplies, as soon as it is done
            products.pop()()


def _gradient_of(x: Tensor | int, arrived: Sequence[Tensor | None]) -> Tensor:
    """Of an input; what the stage did not use has none: zeros of its shape keep the boundary's message static.

    Args:
        x: itself or, of one that is an output, too, the number of that. arrived: gradients of the outputs.
    """
    if isinstance(x, int):
        grad = arrived[x]
        assert grad is not None
        return grad
    return x.grad if x.grad is not None else torch.zeros_like(x)
