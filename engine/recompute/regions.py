"""Runs the regions of blocks such that what their save sets drop is computed again when backward asks for it.

A region that is run is a *call*: its function and its inputs. While it runs, autograd hands over each tensor that it
wants to keep. One that stems from a call whose outputs are dropped (it is an output, or was made within) is not kept:
autograd gets a *slot* in its place. So do later calls that are to be computed again, where such a tensor is an input of
theirs. When backward first asks a slot for its tensor, the call is run again, from tensors that were kept or from slots
of its own, and fills all slots that are still wanted. So each call is run again at most once, as late as can be, and
what it gives is freed as backward lets go of it; nothing is remembered beside the slots. What one layer gives to the
next is kept, if that asks for it: else the last of them would have all run again at once. Who wants calls run again
before backward comes has them noted, and runs them himself, in the order of the forward pass.

The functions are run again as they were: the same module and arguments, gradients enabled, so the same kernels save the
same tensors in the same order, which is how those made within are told apart. Where tensors come from is found by their
memory, so views need no care. (Selective recomputation as such: Korthikanti et al. 2022; torch.utils.checkpoint's
non-reentrant form finds tensors by their order, too.)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.recompute.offload import Handle, Offload
from engine.recompute.save_sets import SaveSet
from model.regions import Region

T = TypeVar("T")


class Recompute:
    """A model's `model.regions.Policy`.

    Args:
        sets: by the name of the layer, in order; others keep all. of_gpu: as of Offload.

    Attributes:
        ran_again: how many calls were, by region. offload: keeps what layers have in host memory.
    """

    def __init__(self, sets: Mapping[str, SaveSet], *, of_gpu: bool = False) -> None:
        self.sets = {name: of for name, of in sets.items() if not of.keeps_all}
        self.ran_again = Counter[Region]()
        self.offload = Offload(lambda layer: list(self.sets).index(layer), of_gpu=of_gpu)
        self._dropped, self._layer = dict[int, tuple[_Call, int]](), ""
        self._notes: list[Noted] | None = None

    def run(self, place: str, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """As Policy."""
        layer, branch = split_place(place)
        if layer != self._layer:
            self._leave()
            self._layer = layer
        of = self.sets.get(layer)
        if of is None or not torch.is_grad_enabled():
            return function(*inputs)
        origin = partial(self.origin, layer)
        count = partial(self.ran_again.update, (region,))
        keep = _as_it_is
        if of.offloads:
            self.offload.enter(layer, (place, region), inputs)
            keep = self.offload.keep
        call = _Call(function, inputs, origin, layer, count, keep, drops=of.dropped(branch, region))
        own = weakref.proxy(call)  # torch holds a hook as long as what it was called for: the call goes by its slots
        with saved_tensors_hooks(lambda x: own.pack(x), _unpack):
            out = function(*inputs)
        if call.drops:
            self._remember(call, _all_of(out))
            if self._notes is not None:
                self._notes.append(Noted(call))
            return out
        if isinstance(out, Tensor) and origin(out) is not None:  # part of what is dropped, and to stay without it
            return cast("T", out.clone(memory_format=torch.contiguous_format))
        return out

    @contextmanager
    def noting(self) -> Iterator[list[Noted]]:
        """Note the calls within that are to be run again, in order."""
        before, self._notes = self._notes, list[Noted]()
        try:
            yield self._notes
        finally:
            self._notes = before
            self._leave()

    def _leave(self) -> None:
        """A layer is over: what it gives is not dropped any more, and its calls live as long as they are wanted."""
        self._dropped.clear()

    @property
    def dropped_now(self) -> int:
        """Outputs that are dropped, and still in use by the forward pass."""
        return len(self._dropped)

    def origin(self, layer: str, x: Tensor) -> tuple[_Call, int] | None:
        """Of which call of a layer, and which of its outputs, this is dropped memory."""
        found = self._dropped.get(x.untyped_storage()._cdata)
        return found if found is not None and found[0].layer == layer else None

    def _remember(self, call: _Call, outputs: Sequence[Any]) -> None:
        call.shape = outputs[0].shape if isinstance(outputs[0], Tensor) else ()
        for place, x in enumerate(outputs):
            if isinstance(x, Tensor) and not call.was_given(x) and self.origin(call.layer, x) is None:
                storage = x.untyped_storage()
                self._dropped[storage._cdata] = call, place
                weakref.finalize(storage, self._dropped.pop, storage._cdata, None)


class Noted:
    """A call that is to be run again, as long as anybody wants it."""

    __slots__ = ("_call",)

    def __init__(self, call: _Call) -> None:
        self._call = weakref.ref(call)

    def again(self, use: Callable[[str], None]) -> None:
        """Run it, if nobody has and its outputs are wanted.

        Args:
            use: has the weights of a layer in place.
        """
        call = self._call()
        if call is not None and call.is_wanted:
            use(call.layer)
            call.again()


class _Call:
    """One run of a region.

    Attributes:
        layer: whose it is. drops: whether its outputs, and what is made within, are computed again.
        shape: of the first output.
    """

    shape: tuple[int, ...] = ()

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        origin: Callable[[Tensor], Any],
        layer: str,
        count: Callable[[], None],
        keep: Callable[[Tensor], Tensor | Handle],
        *,
        drops: bool,
    ) -> None:
        self.layer, self.drops, self._origin, self._packed = layer, drops, origin, 0
        self._count, self._keep = count, keep
        self._function: Callable[..., Any] | None = function
        self._given = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
        self._inputs = [self._source(x) for x in inputs] if drops else []
        self._slots: list[weakref.ref[_Slot]] = []

    def _source(self, x: Any) -> tuple[Any, bool]:
        """An input as it is to be kept, and whether it carries a gradient."""
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
            return x, False
        origin = self._origin(x)
        kept = self._keep(x.detach()) if origin is None else origin[0].slot(x, output=origin[1])
        return kept, x.requires_grad

    def was_given(self, x: Tensor) -> bool:
        """Whether it is an input, or part of one."""
        return x.untyped_storage()._cdata in self._given

    def pack(self, x: Tensor) -> Tensor | _Slot | Handle:
        """What autograd keeps in the place of a tensor."""
        self._packed += 1
        if isinstance(x, nn.Parameter):
            return x
        if (origin := self._origin(x)) is not None:
            call, output = origin
            return call.slot(x, output=output)
        return self.slot(x, packed=self._packed - 1) if self.drops and not self.was_given(x) else self._keep(x)

    def slot(self, x: Tensor, *, output: int | None = None, packed: int | None = None) -> _Slot:
        """For what this call will give again: an output, or the n-th tensor that autograd was to keep."""
        slot = _Slot(self, x, output, packed)
        self._slots.append(weakref.ref(slot))
        return slot

    @property
    def is_wanted(self) -> bool:
        """Whether it was not run again, and there are slots to fill."""
        return self._function is not None and any(slot() is not None for slot in self._slots)

    def again(self) -> None:
        """Run it, and fill the slots."""
        assert self._function is not None, "a region is run again once"
        inputs = [_given(x, carries) for x, carries in self._inputs]
        slots = [slot for reference in self._slots if (slot := reference()) is not None]
        if not self._part_again(slots, inputs):
            made = list[Tensor]()
            with torch.enable_grad(), saved_tensors_hooks(lambda x: made.append(x.detach()), _refuse):
                outputs = _all_of(self._function(*inputs))
            assert len(made) == self._packed, f"{len(made)} tensors were saved, {self._packed} the first time"
            for slot in slots:
                slot.fill(outputs, made)
        self._function, self._inputs = None, []
        self._count()

    def _part_again(self, slots: Sequence[_Slot], inputs: Sequence[Any]) -> bool:
        """Whether all that is wanted were some columns of a product that can give them alone: then they are there."""
        part = getattr(self._function, "part", None)
        wanted = [slot.columns(self.shape) for slot in slots] if part else [None]
        known = [c for c in wanted if c is not None]
        if part is None or len(known) < len(wanted) or not known:
            return False
        columns = slice(min(c.start for c in known), max(c.stop for c in known))
        with torch.no_grad():
            y = part(columns, *inputs) if columns != slice(0, self.shape[1]) else None
        if y is None:
            return False
        for slot, own in zip(slots, known, strict=True):
            slot.set(y[:, own.start - columns.start : own.stop - columns.start])
        return True


class _Slot:
    """Stands for a tensor that is computed again."""

    __slots__ = ("__weakref__", "_call", "_nbytes", "_of", "_value", "_view")

    def __init__(self, call: _Call, x: Tensor, output: int | None, packed: int | None) -> None:
        self._call: _Call | None = call
        self._of, self._value = (output, packed), cast("Tensor | None", None)
        self._view, self._nbytes = (x.dtype, x.storage_offset(), x.size(), x.stride()), x.untyped_storage().nbytes()

    def get(self) -> Tensor:
        """The tensor, of the same bits."""
        if self._value is None:
            assert self._call is not None
            self._call.again()
        assert self._value is not None
        return self._value

    def columns(self, shape: tuple[int, ...]) -> slice | None:
        """Of the first output [R, F], those that the tensor consists of; None if it does not."""
        _, offset, size, stride = self._view
        if self._of[0] != 0 or len(shape) != 2 or len(size) != 2 or stride != (shape[1], 1) or size[0] != shape[0]:
            return None
        return slice(offset, offset + size[1])

    def set(self, x: Tensor) -> None:
        """Take it."""
        self._value, self._call = x, None

    def fill(self, outputs: Sequence[Any], made: Sequence[Tensor]) -> None:
        """Take it out of what a call has given."""
        output, packed = self._of
        x: Tensor = outputs[output] if output is not None else made[packed or 0]
        assert x.untyped_storage().nbytes() == self._nbytes, "what is computed again has another shape"
        dtype, offset, size, stride = self._view
        self.set(torch.empty(0, dtype=dtype, device=x.device).set_(x.untyped_storage(), offset, size, stride))


def _as_it_is(x: Tensor) -> Tensor | Handle:
    return x


def _unpack(kept: Tensor | _Slot | Handle) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.get()


def _refuse(_: Any) -> Tensor:
    raise AssertionError("what is computed again is not differentiated")


def _given(x: Any, carries: bool) -> Any:
    x = x.get() if isinstance(x, _Slot | Handle) else x
    return x.detach().requires_grad_(carries) if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x


def _all_of(out: Any) -> Sequence[Any]:
    return out if isinstance(out, tuple) else (out,)


def split_place(place: str) -> tuple[str, str]:
    """The layer, and its branch or "": `blocks.3`, `attn` of `blocks.3.attn`."""
    *layer, last = place.split(".")
    return (place, "") if last.isdigit() else (".".join(layer), last)
