"""Keeps in host memory what layers keep for backward: there after their forward, back before their backward.

What one forward of a layer sends is a *load*. A GPU's copies run on streams of their own, one for each direction, and
overlap with kernels: a load is on its way while the next layer computes, and lets go of the device's memory when the
layer after that begins; when backward comes to a layer, the load of the layer before it, which backward asks for next,
starts on its way back. So at most two loads beside that of the layer that computes take memory of the device. No host
thread waits for a copy; streams wait for events. (vDNN: Rhu et al. 2016.)

Whole memories are copied, not views, so tensors that share one are sent once, and come back with their offsets and
strides, which are part of the bits of a sum. What somebody else has kept alive is not copied back, and what lives on
from one forward to the next, such as a table, is sent once. On a CPU all is the same, with copies in plain memory,
which save nothing.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

LOADS_IN_FLIGHT = 2
"""The most on their way to or from host memory, beside that of the layer that computes."""

_SMALL = 16
"""What has less than one part in so many of the bytes of a layer's input stays: sums of rows, logarithms of softmax."""


class Link(Protocol):
    """Between a device and the memory of its host."""

    def out(self, x: Tensor) -> Any:
        """A copy of bytes in host memory, which may be under way."""

    def back(self, copy: Any) -> Tensor:
        """Bytes in memory of the device, which may be under way; the stream that computes has waited for `copy`."""

    def after_out(self) -> Any:
        """What to wait for until all that went out is there."""

    def after_back(self) -> Any:
        """What to wait for until all that comes back is there."""

    def wait(self, event: Any) -> None:
        """Have what computes from now on wait."""


class PlainLink:
    """On a CPU both are the same memory."""

    def out(self, x: Tensor) -> Tensor:
        """As Link."""
        return x.clone()

    def back(self, copy: Tensor) -> Tensor:
        """As Link."""
        return copy.clone()

    def after_out(self) -> None:
        """As Link."""

    def after_back(self) -> None:
        """As Link."""

    def wait(self, event: None) -> None:
        """As Link."""


class PlannedLink(PlainLink):
    """On the meta device, of a GPU: what is in host memory is none of its bytes."""

    def out(self, x: Tensor) -> int:  # type: ignore[override]
        """As Link."""
        return x.numel()

    def back(self, copy: int) -> Tensor:  # type: ignore[override]
        """As Link."""
        return torch.empty(copy, dtype=torch.uint8, device="meta")


class CudaLink:
    """Copies to and from pinned memory, on two streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = (torch.cuda.Stream(device) for _ in range(2))

    def out(self, x: Tensor) -> Tensor:
        """As Link."""
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            return copy.copy_(x, non_blocking=True)

    def back(self, copy: Tensor) -> Tensor:
        """As Link."""
        x = torch.empty(copy.shape, dtype=copy.dtype, device=self._device)
        self._back.wait_stream(torch.cuda.current_stream(self._device))  # memory that kernels before may still read
        with torch.cuda.stream(self._back):
            return x.copy_(copy, non_blocking=True)

    def after_out(self) -> torch.cuda.Event:
        """As Link."""
        return self._out.record_event()

    def after_back(self) -> torch.cuda.Event:
        """As Link."""
        return self._back.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """As Link."""
        torch.cuda.current_stream(self._device).wait_event(event)


class Offload:
    """What the layers of a rank keep in host memory.

    Args:
        place: of a layer among those of the rank. of_gpu: whether what runs on the meta device is planned for one.

    Attributes:
        sent: bytes so far.
    """

    def __init__(self, place: Callable[[str], int], *, of_gpu: bool = False) -> None:
        self.sent, self._of_gpu, self._place = 0, of_gpu, place
        self._link: Link | None = None
        self._known = dict[int, _Away]()  # by memory that was sent, while it is alive on the device
        self._now: _Load | None = None
        self._leaving: _Load | None = None
        self._coming: _Load | None = None

    def enter(self, layer: str, region: Hashable, inputs: Sequence[Any]) -> None:
        """A region of a layer begins; the first of them has the layer's input."""
        if self._now is None or not self._now.goes_on(layer, region):
            self._begin(layer, [x for x in inputs if isinstance(x, Tensor)])
            assert self._now is not None
            self._now.regions.add(region)

    def _begin(self, layer: str, inputs: Sequence[Tensor]) -> None:
        if self._coming is not None:
            self._arrive(self._coming)
        before = self._now
        starts = any(x.is_leaf for x in inputs) or before is None or self._place(before.layer) >= self._place(layer)
        if self._leaving is not None:
            self._let_go(self._leaving)
        if before is not None:
            before.gone = self._linked.after_out() if before.held else None
        self._now, self._leaving = _Load(layer, inputs, None if starts else before), before

    def keep(self, x: Tensor) -> Tensor | Handle:
        """What is kept in the place of a tensor."""
        load, storage = self._now, x.untyped_storage()
        assert load is not None
        if storage.nbytes() * _SMALL < load.input_bytes or storage._cdata in load.stays:
            return x
        away = self._known.get(storage._cdata)
        if away is None or away.version != x._version:
            away = self._send(x, storage)
        if away not in load.away:
            load.away.add(away)
            load.held.append(storage)
        return Handle(self, load, away, x)

    def _send(self, x: Tensor, storage: UntypedStorage) -> _Away:
        if self._link is None:
            self._link = _link(x.device, of_gpu=self._of_gpu)
        away = _Away(storage, x._version, self._link.out(_bytes_of(storage, x.device)))
        self.sent += storage.nbytes()
        self._known[storage._cdata] = away
        weakref.finalize(storage, self._known.pop, storage._cdata, None)
        return away

    def settle(self) -> None:
        """All that is on its way has arrived, as far as who computes from now on is concerned."""
        for load in (self._leaving, self._now):
            if load is not None:
                self._let_go(load)

    def have_back(self, load: _Load) -> None:
        """Backward asks for something of it: have it all, and what it will ask for next on its way."""
        if load.is_back:
            return
        before = load.before
        for other in (self._leaving, self._now):
            if other is not None and other not in (load, before):
                self._let_go(other)
        self._arrive(load)
        if before is not None and not before.is_back:
            self._bring(before)

    def _bring(self, load: _Load) -> None:
        """Start it on its way back, unless it is."""
        if load.arriving is not None:
            return
        if self._coming is not None:
            self._arrive(self._coming)
        load.arriving, self._coming = [], load
        for away in load.away:
            if (original := away.original()) is not None:
                load.pinned.append(original)
            elif away.here is None:
                x = self._linked.back(away.copy)
                load.arriving.append(x)
                away.here, away.copy = x.untyped_storage(), None
        load.there = self._linked.after_back() if load.arriving else None

    def _arrive(self, load: _Load) -> None:
        """Have it: what is freed from now on may be used again, since who computes has waited for the copies."""
        self._bring(load)
        if load.there is not None:
            self._linked.wait(load.there)
        load.arriving, load.there, load.is_back = [], None, True
        self._coming = None

    def _let_go(self, load: _Load) -> None:
        """Of the device's memory, once the copies are made."""
        if load.held:
            self._linked.wait(self._linked.after_out() if load.gone is None else load.gone)
            load.held.clear()
        self._leaving = None if load is self._leaving else self._leaving
        self._now = None if load is self._now else self._now

    @property
    def _linked(self) -> Link:
        assert self._link is not None, "nothing was sent"
        return self._link


class _Load:
    """What one forward of a layer sends.

    Attributes:
        before: that of the layer before it in the same forward. stays: memory that is held anyway: an input that a
            stage was sent, whose gradient it asks for. away: all of it that is still wanted. held: memory of the
            device, until copies are made (`gone`). arriving: what comes back, until it is there (`there`); None: it was
            not asked for. pinned: what is to come back, and never went.
    """

    def __init__(self, layer: str, inputs: Sequence[Tensor], before: _Load | None) -> None:
        self.layer, self.regions = layer, set[Hashable]()
        self.input_bytes = inputs[0].untyped_storage().nbytes() if inputs else 0
        self.stays = {x.untyped_storage()._cdata for x in inputs if x.is_leaf and x.requires_grad}
        self.away = weakref.WeakSet[_Away]()
        self.held, self.pinned = list[UntypedStorage](), list[UntypedStorage]()
        self.gone: Any = None
        self.there: Any = None
        self.arriving: list[Tensor] | None = None
        self.is_back = False
        self._before = None if before is None else weakref.ref(before)

    @property
    def before(self) -> _Load | None:
        """If anything of it is still wanted."""
        return None if self._before is None else self._before()

    def goes_on(self, layer: str, region: Hashable) -> bool:
        """Whether a region of a layer belongs to the same forward: each runs once in it."""
        if layer != self.layer or region in self.regions:
            return False
        self.regions.add(region)
        return True


class _Away:
    """Memory that was sent.

    Attributes:
        version: of what is in it. original: while it is alive. here: what it is once it is back.
    """

    def __init__(self, storage: UntypedStorage, version: int, copy: Any) -> None:
        self.version, self.copy = version, copy
        self.original = weakref.ref(storage)
        self.here: UntypedStorage | None = None


class Handle:
    """Stands for a tensor whose memory is away."""

    __slots__ = ("_away", "_load", "_owner", "_view")

    def __init__(self, owner: Offload, load: _Load, away: _Away, x: Tensor) -> None:
        self._owner, self._load, self._away = owner, load, away
        self._view = x.dtype, x.device, x.storage_offset(), x.size(), x.stride()

    def get(self) -> Tensor:
        """The tensor, of the same bits."""
        self._owner.have_back(self._load)
        storage = self._away.original() if self._away.here is None else self._away.here
        dtype, device, offset, size, stride = self._view
        return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, size, stride)  # type: ignore[arg-type]


def host_rate(device: torch.device) -> float:
    """Bytes per second from a device to its host's memory: the median of five copies."""
    x, seconds = torch.zeros(1 << 26, dtype=torch.uint8, device=device), list[float]()
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=device.type == "cuda")
    for _ in range(5):
        began = time.perf_counter()
        copy.copy_(x)  # waits
        seconds.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(seconds)


def _bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _link(device: torch.device, *, of_gpu: bool) -> Link:
    match device.type:
        case "cuda":
            return CudaLink(device)
        case "meta" if of_gpu:
            return PlannedLink()
        case _:
            return PlainLink()
