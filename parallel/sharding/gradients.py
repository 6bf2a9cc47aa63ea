"""Gradients: contributions are added up in place as backward produces them, and each unit is reduced in its turn.

Two ways. *Kept*: every bucket keeps the whole gradient, micro-batches add up in it, and it is reduced once per step,
when its last contribution is there. *Staged* (always from ZeRO stage 2 on): a micro-batch's gradient of a unit is put
into one of two buffers, reduced at once, and the sum added to this rank's shard. Either way units are reduced in a
fixed order, so that all ranks of a group issue the same collectives in the same order (Li et al. 2020, "PyTorch
Distributed"), and ranks are added up in the order of their index.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.sharding.buckets import Bucket
from parallel.sharding.plan import Slot
from parallel.sharding.units import Unit, bytes_of, gradient_dtype, received, views_in
from parallel.sums import squared_norm
from parallel.tensor import products
from parallel.tensor.weight_grad import attach_sink

_IN_FLIGHT = 2  # units whose reduction has been started and not been taken in


@dataclass
class _Flight:
    """A reduction on its way, and the buffers that it holds."""

    pending: list[comm.Pending]
    staging: Tensor | None
    receiving: Tensor


class GradientSync:
    """Takes every gradient contribution of the units on this rank, and sums over ranks.

    Args:
        stages: the units of each pipeline stage on this rank, in forward order. device: of the buffers.
        is_lent: whether a tensor is of weights whose memory others will take.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Unit]],
        device: torch.device,
        is_lent: Callable[[Tensor], bool] = lambda tensor: False,
    ) -> None:
        self._device, self._is_lent = device, is_lent
        self.units = [unit for stage in stages for unit in stage if unit.slots]
        self._order = [[unit for unit in reversed(stage) if unit.slots] for stage in stages]
        self._turn = [0] * len(stages)
        self._chain = {id(unit): chain for chain, units in enumerate(self._order) for unit in units}
        self._slot = {slot.parameter: (slot, unit) for unit in self.units for slot in unit.slots}
        self._deferred: list[Callable[[], None]] | None = None
        self._flights: deque[_Flight] = deque()
        self._held: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self._in_turn, self._holds = deque[int](), False
        self._staging = self._buffers([bytes_of(unit.staged, gradient_dtype) for unit in self.units], device)
        self._receiving = self._buffers(
            [bytes_of(self._sent(unit), gradient_dtype, received) for unit in self.units], device
        )
        self._staged_at: dict[int, Tensor] = {}
        for slot, _ in self._slot.values():
            attach_sink(slot.parameter, self)
            slot.parameter.register_post_accumulate_grad_hook(self._take_grad)
        for unit in self.units:
            for bucket in unit.buckets:
                if bucket.grads is not None:
                    for slot in bucket.slots:
                        slot.grad = slot.view(bucket.grads)

    @staticmethod
    def _buffers(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
        largest = max(sizes, default=0)
        return [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_IN_FLIGHT)]

    @staticmethod
    def _sent(unit: Unit) -> list[Bucket]:
        return [bucket for bucket in unit.buckets if bucket.kind.trains and bucket.axis.size > 1]

    @property
    def buffers(self) -> list[Tensor]:
        """Memory for gradients on their way; all of it, between steps."""
        return [*self._staging, *self._receiving]

    # -- a step -------------------------------------------------------------------------------------------------------

    def start(self, num_micro_batches: int) -> None:
        """Begin a step: every parameter expects its contributions of each micro-batch.

        Whatever a step that was broken off left behind is dropped.
        """
        while self._flights:
            self._take_in()
        self._turn = [0] * len(self._turn)
        self._held.clear()
        self._in_turn, self._holds = deque(), False
        for index in list(self._staged_at):
            self._staging.append(self._staged_at.pop(index))
        for unit in self.units:
            unit.left, unit.complete = num_micro_batches, False
            self._expect(unit, fresh=True)
        self._first = num_micro_batches

    @staticmethod
    def _expect(unit: Unit, *, fresh: bool) -> None:
        unit.missing = sum(slot.uses for slot in unit.slots)
        for bucket in unit.buckets:
            for slot in bucket.slots:
                slot.missing = slot.uses
                slot.fresh = fresh or bucket.grads is None

    def finish(self) -> None:
        """Wait until every shard holds its sum over ranks; where a rank updates everything, until it holds all sums.

        Raises:
            RuntimeError: a parameter did not get its contributions, so that a reduction could not start.
        """
        if any(unit.left for unit in self.units):
            late = [slot.name for unit in reversed(self.units) if unit.left for slot in unit.slots if slot.missing]
            raise RuntimeError(f"no complete gradient for {', '.join(late[:5])}{' ...' if len(late) > 5 else ''}")
        self.release()
        while self._flights:
            self._take_in()
        for unit in self.units:
            for bucket in self._sent(unit):
                if bucket.stage == 0:
                    bucket.complete(bucket.sums)

    def hold(self, order: Sequence[int]) -> None:
        """Start no reduction that ends this step before `release`, and then in this order of stages, by their place.

        Without this they start in the order in which stages are complete, which is then the same on all ranks.
        """
        self._in_turn, self._holds = deque(order), True

    def release(self) -> None:
        """Start what was held, as far as it is complete and in its turn."""
        self._holds = False
        while self._in_turn:
            chain = self._in_turn[0]
            for send in self._held.pop(chain, ()):
                send()
            if any(unit.left for unit in self._order[chain]):
                return
            self._in_turn.popleft()

    # -- contributions ------------------------------------------------------------------------------------------------

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        """Add grad_output' x to the parameter's gradient, now or, inside `deferring`, when the products are run.

        x may be of weights (the probe that a pooling layer attends with), which are no longer gathered by then.
        """
        if self._deferred is not None:
            x = x.detach()  # else it keeps, until then, the inputs of the stage and their gradients
            x = x.clone() if self._is_lent(x) else x
        self._do(lambda: self._add_product(parameter, grad_output, x))

    def add_computed(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        """Add what `product` gives to the parameter's gradient, now or when the products are run."""
        self._do(lambda: self._add(parameter, product(), whole=False))

    @contextmanager
    def deferring(self) -> Iterator[list[Callable[[], None]]]:
        """Put off all contributions: the list that is given must be called, one by one, later."""
        products: list[Callable[[], None]] = []
        self._deferred = products
        try:
            yield products
        finally:
            self._deferred = None

    def _do(self, contribute: Callable[[], None]) -> None:
        if self._deferred is not None:
            self._deferred.append(contribute)
        else:
            contribute()

    @torch.no_grad()
    def _add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        slot, unit = self._slot[parameter]
        target = self._target(slot, unit)
        products.weight_gradient(grad_output, x, out=target, accumulate=not slot.fresh)
        self._arrived(slot, unit, 1)

    @torch.no_grad()
    def _add(self, parameter: nn.Parameter, grad: Tensor, *, whole: bool) -> None:
        slot, unit = self._slot[parameter]
        target = self._target(slot, unit)
        if slot.fresh:
            target.copy_(grad)
        else:
            target.add_(grad)
        self._arrived(slot, unit, slot.missing if whole else 1)

    def _take_grad(self, parameter: Tensor) -> None:
        """Hook: take over what autograd accumulated in `.grad` over all uses (nothing, where a product was added)."""
        assert isinstance(parameter, nn.Parameter)
        grad, parameter.grad = parameter.grad, None
        if grad is not None:
            self._do(lambda: self._add(parameter, grad, whole=True))

    def _target(self, slot: Slot, unit: Unit) -> Tensor:
        if slot.missing == 0 or not unit.left:
            raise AssertionError(f"{slot.name} got more gradients than micro-batches")
        if unit.staged and unit.index not in self._staged_at:
            self._stage(unit)
        assert slot.grad is not None
        return slot.grad

    def _stage(self, unit: Unit) -> None:
        """Give the unit a buffer for the gradients of this micro-batch."""
        while not self._staging and self._flights:
            self._take_in()
        memory = self._staging.pop() if self._staging else self._spare()
        self._staged_at[unit.index] = memory
        for bucket, flat in zip(unit.staged, views_in(memory, unit.staged, gradient_dtype), strict=True):
            end = 0
            for slot in bucket.slots:  # what lies between parameters takes part in sums and norms
                if end < slot.offset:
                    flat[end : slot.offset].zero_()
                slot.grad = slot.view(flat)
                end = slot.offset + slot.numel
            flat[end:].zero_()

    def _spare(self) -> Tensor:
        """One more buffer, should units be completed out of order so that both wait."""
        return torch.empty_like(next(iter(self._staged_at.values())))

    def _arrived(self, slot: Slot, unit: Unit, contributions: int) -> None:
        slot.fresh = False
        slot.missing -= contributions
        unit.missing -= contributions
        if unit.missing:
            return
        unit.complete = True
        chain = self._chain[id(unit)]
        order = self._order[chain]
        while order[self._turn[chain]].complete:
            self._reduce(order[self._turn[chain]])
            self._turn[chain] = (self._turn[chain] + 1) % len(order)

    # -- reduction ----------------------------------------------------------------------------------------------------

    def _reduce(self, unit: Unit) -> None:
        """Start summing what is complete: staged buckets always, kept ones with the last micro-batch."""
        first, last = unit.left == self._first, unit.left == 1
        unit.left, unit.complete = unit.left - 1, False
        staging = self._staged_at.pop(unit.index, None)
        sources: list[tuple[Bucket, Tensor]] = []
        if staging is not None:
            sources += zip(unit.staged, views_in(staging, unit.staged, gradient_dtype), strict=True)
        if last:
            sources += [(bucket, bucket.grads) for bucket in unit.buckets if bucket.grads is not None]
        sent = [(b, source) for b, source in sources if b.axis.size > 1]
        if last and staging is None and self._in_turn:
            self._held[self._chain[id(unit)]].append(lambda: self._send(sent, None, first=first))
            if not self._holds:
                self.release()
        else:
            self._send(sent, staging, first=first)
        for bucket, source in sources:
            if bucket.axis.size == 1 and source.dtype != torch.float32:
                bucket.sums.copy_(source)
        if not last:
            self._expect(unit, fresh=False)

    def _send(self, sources: list[tuple[Bucket, Tensor]], staging: Tensor | None, *, first: bool) -> None:
        """Start summing over ranks: over the shards' sums, or onto those of the micro-batches before."""
        if not sources:
            return
        while len(self._flights) >= _IN_FLIGHT:
            self._take_in()
        receiving = self._receiving.pop()
        places = views_in(receiving, [bucket for bucket, _ in sources], gradient_dtype, received)
        pending = [
            comm.reduce_scatter_into_start(
                bucket.own_sums, source, place, bucket.axis, accumulate=bucket.grads is None and not first
            )
            for (bucket, source), place in zip(sources, places, strict=True)
        ]
        self._flights.append(_Flight(pending, staging, receiving))

    def _take_in(self) -> None:
        """Wait for the oldest reduction and add it to its shards."""
        flight = self._flights.popleft()
        for pending in flight.pending:
            pending.wait()
        self._receiving.append(flight.receiving)
        if flight.staging is not None:
            self._staging.append(flight.staging)

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Sum of squares of this rank's share of the gradient sums, fp64 scalar: over all ranks each element of the
        logical gradient counts once.
        """
        counted = [
            part for unit in self.units for bucket in unit.buckets if bucket.kind.trains for part in bucket.counted
        ]
        if not counted:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return squared_norm(counted)
