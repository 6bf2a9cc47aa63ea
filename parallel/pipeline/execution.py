"""Runs any valid schedule: walks this rank's program, one method per kind of action.

Knows neither what a stage computes nor which generator made the schedule. Shapes at stage boundaries are static, so
receives are posted without asking; what flows is a tuple of tensors. A stage is called as `stage(inputs,
micro_batch)`, the first one with no inputs; what the last one returns is turned into a loss by the caller's function.

What is kept per micro-batch between forward and backward: the stage's inputs, and the edge of the autograd graph at its
outputs. The outputs themselves are freed once they are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel import comm
from parallel.comm import Axis, Pending
from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.boundary import TensorSpec as TensorSpec

Tensors = tuple[Tensor, ...]
Products = list[Callable[[], None]]

# Messages whose end is not waited for. A message is freed at the latest when this many others have been posted after
# it: gloo does not tell that a send is done before somebody waits for it. A valid schedule does not block on that.
_SENDS_IN_FLIGHT = 4


class StageModule(Protocol):
    """One pipeline stage."""

    def __call__(self, inputs: Tensors, micro_batch: Any) -> Tensors:
        """Inputs of the boundary before (none for the first stage) -> outputs of the boundary after."""


class Deferrer(Protocol):
    """Who can put off weight gradients (parallel.sharding.gradients.GradientSync)."""

    def deferring(self) -> AbstractContextManager[Products]:
        """Put off products within; the list is called later."""


@dataclass
class _Kept:
    """What one micro-batch keeps on one stage between forward and backward.

    Attributes:
        inputs: those that carry a gradient. roots: of the outputs that carry one, None where nothing that is trained,
            here or before, has made it.
    """

    inputs: Tensors = ()
    roots: list[GradientEdge | None] = field(default_factory=list)
    products: Products = field(default_factory=list)


class PipelineExecutor:
    """Executes one schedule on one rank.

    Args:
        schedule: validated; its communication inserted.
        stages: this rank's stages by their number.
        boundaries: entry s describes the inputs of stage s (empty for stage 0).
        axis: the pipeline axis. device: where received tensors are made.
        deferrer: puts off weight gradients for schedules that split the backward.
        before_run: told this rank's actions before each pass over them.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, StageModule],
        boundaries: Sequence[tuple[TensorSpec, ...]],
        *,
        axis: Axis,
        device: torch.device,
        deferrer: Deferrer | None = None,
        before_run: Callable[[Sequence[Action]], None] | None = None,
    ) -> None:
        assert set(stages) == set(schedule.stages_of(axis.index)), (set(stages), schedule.stages_of(axis.index))
        self.schedule, self.stages, self.boundaries = schedule, stages, boundaries
        self.axis, self.device, self.deferrer, self.before_run = axis, device, deferrer, before_run
        self._last = schedule.num_stages - 1
        self._run: dict[ActionKind, Callable[[int, int], None]] = {
            ActionKind.FORWARD: self._forward,
            ActionKind.BACKWARD: self._backward,
            ActionKind.BACKWARD_INPUT: self._backward_input,
            ActionKind.BACKWARD_WEIGHT: self._backward_weight,
            ActionKind.SEND_FORWARD: self._send_forward,
            ActionKind.RECV_FORWARD: self._recv_forward,
            ActionKind.SEND_BACKWARD: self._send_backward,
            ActionKind.RECV_BACKWARD: self._recv_backward,
        }
        unknown = {action.kind for action in schedule.ranks[axis.index]} - set(self._run)
        if unknown:
            raise ValueError(
                f"schedule {schedule.name} uses {sorted(k.name for k in unknown)}, which cannot be run yet"
            )

    def run(self, micro_batches: Sequence[Any], head: Callable[[Tensors, Any], Tensor]) -> list[Tensor]:
        """One pass over the schedule.

        Args:
            micro_batches: handed to the stages as they are, one per micro-batch of the schedule.
            head: outputs of the last stage and its micro-batch -> the scalar to differentiate (training), or whatever
                tensor is to be returned (a forward-only schedule).

        Returns:
            What `head` returned for each micro-batch, detached, on ranks that hold the last stage; elsewhere nothing.
        """
        assert len(micro_batches) == self.schedule.num_micro_batches, (len(micro_batches), self.schedule)
        self._micro_batches, self._head = micro_batches, head
        self._results: list[Tensor] = []
        self._arriving: dict[tuple[ActionKind, int, int], list[Pending] | Tensors] = {}
        self._leaving: dict[tuple[ActionKind, int, int], Tensors] = {}
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._sent: deque[list[Pending]] = deque()
        if self.before_run is not None:
            self.before_run(self.schedule.ranks[self.axis.index])
        with torch.set_grad_enabled(not self.schedule.is_forward_only):
            for action in self.schedule.ranks[self.axis.index]:
                self._do(action)
        self._free_sent(0)
        assert not (self._kept or self._arriving or self._leaving), "the schedule left tensors behind"
        self._micro_batches = ()
        return self._results

    def _do(self, action: Action) -> None:
        assert action.micro_batch is not None
        self.axis.meter.where.now(action)
        self._run[action.kind](action.stage, action.micro_batch)

    # -- computing ----------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, m: int) -> None:
        inputs = self._take(ActionKind.RECV_FORWARD, stage, m) if stage else ()
        keep = torch.is_grad_enabled()
        if keep:
            for x, spec in zip(inputs, self.boundaries[stage], strict=True):
                x.requires_grad_(spec.carries_gradient)
        outputs = self.stages[stage](inputs, self._micro_batches[m])
        if stage == self._last:
            result = self._head(outputs, self._micro_batches[m])
            self._results.append(result.detach())
            roots: Tensors = (result,)
        else:
            self._hand_over(ActionKind.RECV_FORWARD, stage + 1, m, tuple(x.detach() for x in outputs))
            roots = self._carrying(stage + 1, outputs)
        if keep:
            edges = [get_gradient_edge(x) if x.requires_grad else None for x in roots]
            self._kept[stage, m] = _Kept(self._carrying(stage, inputs), edges)

    def _carrying(self, boundary: int, tensors: Tensors) -> Tensors:
        """Those of a boundary's tensors that carry a gradient."""
        return tuple(x for x, spec in zip(tensors, self.boundaries[boundary], strict=True) if spec.carries_gradient)

    def _backward(self, stage: int, m: int) -> None:
        self._differentiate(stage, m, self._kept.pop((stage, m)))

    def _backward_input(self, stage: int, m: int) -> None:
        assert self.deferrer is not None, "a schedule that splits the backward needs a deferrer"
        kept = self._kept[stage, m]
        with self.deferrer.deferring() as products:
            self._differentiate(stage, m, kept)
        self._kept[stage, m] = _Kept(products=products)

    def _backward_weight(self, stage: int, m: int) -> None:
        for product in self._kept.pop((stage, m)).products:
            product()

    def _differentiate(self, stage: int, m: int, kept: _Kept) -> None:
        last = stage == self._last
        grads = (None,) if last else self._take(ActionKind.RECV_BACKWARD, stage, m)
        edges = [(root, grad) for root, grad in zip(kept.roots, grads, strict=True) if root is not None]
        torch.autograd.backward([root for root, _ in edges], [grad for _, grad in edges])
        if stage:
            # What the stage did not use has no gradient; zeros of its shape keep the boundary's message static.
            own = tuple(x.grad if x.grad is not None else torch.zeros_like(x) for x in kept.inputs)
            self._hand_over(ActionKind.RECV_BACKWARD, stage - 1, m, own)

    # -- tensors between stages ---------------------------------------------------------------------------------------

    def _hand_over(self, arrival: ActionKind, stage: int, m: int, tensors: Tensors) -> None:
        """Lay tensors out for the neighbour `stage`: as arrived if it is on this rank, else for the send to come."""
        here = self.schedule.stage_to_rank[stage] == self.axis.index
        (self._arriving if here else self._leaving)[arrival, stage, m] = tensors

    def _take(self, arrival: ActionKind, stage: int, m: int) -> Tensors:
        arrived = self._arriving.pop((arrival, stage, m))
        return tuple(x.wait() if isinstance(x, Pending) else x for x in arrived)

    def _send(self, arrival: ActionKind, stage: int, m: int) -> None:
        self._free_sent(_SENDS_IN_FLIGHT - 1)
        to = self.schedule.stage_to_rank[stage]
        self._sent.append([comm.send_start(x, self.axis, to) for x in self._leaving.pop((arrival, stage, m))])

    def _free_sent(self, keep: int) -> None:
        """Let go of messages that are done, and wait for the oldest until at most `keep` are left."""
        while self._sent and (len(self._sent) > keep or all(x.is_done() for x in self._sent[0])):
            for pending in self._sent.popleft():
                pending.wait()

    def _recv(self, arrival: ActionKind, stage: int, m: int, source: int, boundary: int) -> None:
        rank = self.schedule.stage_to_rank[source]
        specs = [
            spec for spec in self.boundaries[boundary] if spec.carries_gradient or arrival is ActionKind.RECV_FORWARD
        ]
        buffers = [torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
        self._arriving[arrival, stage, m] = [comm.recv_start(x, self.axis, rank) for x in buffers]

    def _send_forward(self, stage: int, m: int) -> None:
        self._send(ActionKind.RECV_FORWARD, stage + 1, m)

    def _recv_forward(self, stage: int, m: int) -> None:
        self._recv(ActionKind.RECV_FORWARD, stage, m, stage - 1, stage)

    def _send_backward(self, stage: int, m: int) -> None:
        self._send(ActionKind.RECV_BACKWARD, stage - 1, m)

    def _recv_backward(self, stage: int, m: int) -> None:
        self._recv(ActionKind.RECV_BACKWARD, stage, m, stage + 1, stage + 1)
