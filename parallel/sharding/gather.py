"""ZeRO stage 3: weights gathered before a unit is used, the next unit's on the way meanwhile, forgotten afterwards.

A pass over a schedule is known beforehand, so the whole list of units to come is: the one needed next is fetched while
this one computes, and when a buffer must be given up, it is that of the unit whose next use is farthest off (Belady
1966), which no cache can beat. With buffers for two units this is FSDP's resharding after forward; with buffers for all
of them, weights stay from the first forward to the last backward; anything between keeps what fits.

A buffer is used for many units in turn. Parameters are bound to it by their `.data`, so what autograd saved (the
parameter itself) finds the weights that were gathered again for backward. What is recomputed within a backward pass
saves aliases of the buffer of that moment (torch.utils.checkpoint does), so those units keep their buffers until their
backward is over; where a region spans more units than there are buffers, more are made. No layer may let autograd save
a *view* of a parameter: it would still point to the buffer of the first gather, which by then holds another unit's
weights. tests/parity/test_zero.py, with two buffers for many units, sees that none does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from parallel.comm import Pending
from parallel.sharding.units import Unit, bytes_of, views_in, weight_dtype, whole_anywhere

_NEVER = 1 << 60


class Buffer:
    """Memory for the gathered weights of one unit at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.holds: Unit | None = None
        self.arriving: list[Pending] = []


class Gatherer:
    """Brings the weights of units into buffers, ahead of their use where the uses to come are known.

    How many buffers there are decides what is gathered when, and heads dealt out unevenly make units of other sizes on
    other tensor ranks, which share the gathers of what is partial. So the number follows from the largest sizes found
    on any of them, and only the buffers' lengths from this rank's own.

    Args:
        units: in forward order; those without sharded weights are left alone. device: of the buffers.
        budget: bytes that buffers may take; two as large as the largest unit are made in any case. The same on all
            ranks that share a gather.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, budget: float) -> None:
        gathered = [unit for unit in units if unit.gathered]
        count = _buffers_within(budget, [bytes_of(u.gathered, weight_dtype, whole_anywhere) for u in gathered])
        self.keeps_all = count >= len(gathered)
        sizes = {unit.index: bytes_of(unit.gathered, weight_dtype) for unit in gathered}
        lengths = list(sizes.values()) if self.keeps_all else [max(sizes.values())] * count
        self.buffers = [Buffer(torch.empty(length, dtype=torch.uint8, device=device)) for length in lengths]
        self._home = dict(zip(sizes, self.buffers, strict=False)) if self.keeps_all else {}
        self._at: dict[int, Buffer] = {}
        self._views: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        self._pinned: set[int] = set()  # recomputed in this backward pass, and still to go through it
        self._backward_at = -1
        self.units = {unit.index: unit for unit in units if unit.gathered}
        self.plan([])

    def plan(self, uses: Sequence[int]) -> None:
        """Say which units (by index) will be used, in order, from now on."""
        self._uses = [index for index, _ in groupby(index for index in uses if index in self.units)]
        self._place = 0
        self._positions: dict[int, list[int]] = defaultdict(list)
        for position, index in enumerate(self._uses):
            self._positions[index].append(position)

    def forget(self) -> None:
        """What is gathered is out of date."""
        assert not any(buffer.arriving for buffer in self.buffers)
        for buffer in self.buffers:
            buffer.holds = None
        self._at.clear()
        self._pinned.clear()

    def lends(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or is part of, memory that holds other weights once its unit is given up."""
        memory = tensor.untyped_storage().data_ptr()
        return any(buffer.memory.untyped_storage().data_ptr() == memory for buffer in self.buffers)

    def use_forward(self, index: int) -> None:
        """`use`, for a unit that is about to run; within a backward pass, because activations are recomputed."""
        if torch._C._current_graph_task_id() < 0:
            self._pinned.clear()
            self.use(index)
        elif index in self.units:
            self._pinned.add(index)
            self._fetch(index, keep=-1)
            self._land(index)

    def use_backward(self, index: int) -> None:
        """`use`, for a unit whose backward pass is about to begin: that of the one before it is over."""
        if index != self._backward_at:
            self._pinned.discard(self._backward_at)
        self._backward_at = index
        self.use(index)

    def use(self, index: int) -> None:
        """Have the weights of this unit in place, and the next ones on their way. Collective."""
        if index not in self.units:
            return
        if not self._place or self._uses[self._place - 1] != index:  # else it is used again, as when recomputed
            positions = self._positions[index]
            here = bisect_left(positions, self._place)
            self._place = positions[here] + 1 if here < len(positions) else self._place
        self._fetch(index, keep=-1)
        self._land(index)
        if self._place < len(self._uses) and (self._home or self._candidates(index)):
            self._fetch(self._uses[self._place], keep=index)

    def finish(self) -> None:
        """Take in what is on its way but was not used."""
        for buffer in self.buffers:
            if buffer.holds is not None and buffer.arriving:
                self._land(buffer.holds.index)

    def _fetch(self, index: int, keep: int) -> None:
        """Start gathering a unit, over the buffer that is dispensable longest; `keep` is in use."""
        if index in self._at:
            return
        unit, buffer = self.units[index], self._home.get(index) or self._dispensable(keep)
        if buffer.holds is not None:
            if buffer.arriving:  # fetched for a use that did not come
                self._land(buffer.holds.index)
            del self._at[buffer.holds.index]
        buffer.holds = unit
        self._at[index] = buffer
        views = views_in(buffer.memory, unit.gathered, weight_dtype)
        buffer.arriving = [b.gather_start(view, b.weights) for b, view in zip(unit.gathered, views, strict=True)]

    def _land(self, index: int) -> None:
        buffer = self._at[index]
        if not buffer.arriving:
            return
        for pending in buffer.arriving:
            pending.wait()
        buffer.arriving = []
        for parameter, view in self._bindings(self.units[index], buffer):
            parameter.data = view

    def _dispensable(self, keep: int) -> Buffer:
        def next_use(buffer: Buffer) -> int:
            if buffer.holds is None:
                return _NEVER + 1
            positions = self._positions[buffer.holds.index]
            here = bisect_left(positions, self._place)
            return positions[here] if here < len(positions) else _NEVER

        if not (candidates := self._candidates(keep)):  # more units are recomputed at once than there are buffers
            candidates = [Buffer(torch.empty_like(self.buffers[0].memory))]
            self.buffers += candidates
        return max(candidates, key=next_use)

    def _candidates(self, keep: int) -> list[Buffer]:
        """Buffers that may be given up while unit `keep` is in use."""
        return [b for b in self.buffers if b.holds is None or b.holds.index not in {keep, *self._pinned}]

    def _bindings(self, unit: Unit, buffer: Buffer) -> list[tuple[nn.Parameter, Tensor]]:
        key = (unit.index, id(buffer))
        if key not in self._views:
            flats = zip(unit.gathered, views_in(buffer.memory, unit.gathered, weight_dtype), strict=True)
            self._views[key] = [(slot.parameter, slot.view(flat)) for bucket, flat in flats for slot in bucket.slots]
        return self._views[key]

    def watch(self, unit: Unit, layers: Sequence[nn.Module]) -> None:
        """Have a unit's weights in place whenever one of its layers runs, forward, backward or again."""
        for layer in layers:  # recomputation may begin with any of them
            layer.register_forward_pre_hook(lambda _module, _args: self.use_forward(unit.index))
        layers[-1].register_forward_hook(lambda _module, _args, out: self._before_backward(out, unit.index))

    def _before_backward(self, out: Any, index: int) -> Any:
        if isinstance(out, tuple):
            return tuple(self._before_backward(x, index) for x in out)
        return _BeforeBackward.apply(out, self, index) if isinstance(out, Tensor) and out.requires_grad else out


def _buffers_within(budget: float, sizes: Sequence[int]) -> int:
    """How many buffers fit: one for each unit if all do, else as many as large as the largest, two at least."""
    total = sum(sizes)
    return len(sizes) if total <= budget else max(2, int(budget // max(sizes)))


class _BeforeBackward(torch.autograd.Function):
    """Identity; backward first has the unit's weights in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gatherer: Gatherer, index: int) -> Tensor:
        ctx.gatherer, ctx.index = gatherer, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.gatherer.use_backward(ctx.index)
        return grads[0], None, None
