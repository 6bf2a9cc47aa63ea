"""How micro-batches come to the device: on a GPU by a stream of its own, while it computes.

The host is ahead of a GPU, whose kernels it only launches: a micro-batch is asked for while the one before it is being
computed, the first of a step while the optimizer of the step before is. So what must not be is that its copy waits for
these kernels, which it would on their stream; nobody has to ask any earlier.

Memory of what was copied is the side stream's, and is used again once all that was launched on the stream that computes
until it was let go is over (`record_stream`). Nothing else bounds how much of it is under way, so the host waits for a
GPU that is far behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from data import Batch
from model import MicroBatch

AHEAD = 2
"""Micro-batches that are on their way at most while a GPU has not come to those before."""

ToDevice = Callable[[Batch], MicroBatch]


class Transfer(Protocol):
    """Moves micro-batches of one rank."""

    def move(self, batch: Batch, to_device: ToDevice) -> MicroBatch:
        """What can be computed with from now on."""

    def late(self) -> float:
        """Seconds that the device has waited for copies since the last call; to be asked when it has nothing to do."""


class InPlace(Transfer):
    """On a CPU, whose memory all of it is in."""

    def move(self, batch: Batch, to_device: ToDevice) -> MicroBatch:
        """As Transfer."""
        return to_device(batch)

    def late(self) -> float:
        """As Transfer."""
        return 0.0


class SideStream(Transfer):
    """Copies from pinned memory, ordered by events before what computes.

    Attributes:
        stream: of the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.stream = device, torch.cuda.Stream(device)
        self._asked = deque[torch.cuda.Event]()
        self._waits = deque[tuple[torch.cuda.Event, torch.cuda.Event]]()
        self._late = 0.0

    def move(self, batch: Batch, to_device: ToDevice) -> MicroBatch:
        """As Transfer."""
        if len(self._asked) == AHEAD:
            self._asked.popleft().synchronize()
            self._add_up()
        compute = torch.cuda.current_stream(self._device)
        self._asked.append(compute.record_event())
        with torch.cuda.stream(self.stream):
            moved = to_device(_pinned(batch))
            arrived = self.stream.record_event()
        began = compute.record_event(torch.cuda.Event(enable_timing=True))
        compute.wait_event(arrived)
        self._waits.append((began, compute.record_event(torch.cuda.Event(enable_timing=True))))
        for x in _tensors(moved):
            x.record_stream(compute)
        return moved

    def late(self) -> float:
        """As Transfer."""
        self._add_up()
        late, self._late = self._late, 0.0
        return late

    def _add_up(self) -> None:
        """Of waits that are over: events of all others are kept."""
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            self._late += 1e-3 * began.elapsed_time(ended)


def transfer_to(device: torch.device) -> Transfer:
    """That of a device."""
    return SideStream(device) if device.type == "cuda" else InPlace()


def _pinned(batch: Batch) -> Batch:
    """In memory that is copied from without the host: what comes from workers is, what was made here is not."""
    pageable = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor) and not x.is_pinned()}
    pinned: dict[str, Any] = {name: x.pin_memory() for name, x in pageable.items()}
    return replace(batch, **pinned)


def _tensors(batch: MicroBatch) -> Iterator[Tensor]:
    """All of a micro-batch that was moved."""
    yield from (x for x in vars(batch).values() if isinstance(x, Tensor))
    for of in batch.teachers:
        yield from of.values()
