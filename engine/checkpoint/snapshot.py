"""A copy of what a rank is to write, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from parallel.checkpoint.write import Item, as_bytes


class Snapshot:
    """Memory of the host for a rank's items, kept from save to save: pinned where they come from a GPU.

    `take` may run in a thread of its own. On a GPU it copies on a stream of its own, behind all that was queued when
    the snapshot was `begun`.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._begun: torch.cuda.Event | None = None
        self._device = torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Of memory held."""
        return self._memory.nbytes

    def begin(self, device: torch.device) -> None:
        """What is to be copied is as it is now."""
        self._device = device
        if device.type == "cuda":
            self._begun = torch.cuda.Event()
            self._begun.record(torch.cuda.current_stream(device))

    def take(self, items: Sequence[Item]) -> list[Item]:
        """The items, their values copied."""
        size = sum(item.box.numel * item.values.itemsize for item in items)
        if self._memory.nbytes < size:
            self._renew(size)
        copies, start = [], 0
        for item in items:
            stop = start + item.box.numel * item.values.itemsize
            room = self._memory[start:stop].view(item.values.dtype).view(item.box.shape)
            copies.append(item._replace(values=room))
            start = stop
        if self._begun is not None:
            _copy_from_gpu(self._device, self._begun, items, copies)
        else:
            for item, copy in zip(items, copies, strict=True):
                _copy(copy.values, item.values)
        return copies

    def _renew(self, size: int) -> None:
        """Never two; and pinned by the driver, as torch's allocator of pinned memory rounds up to a power of two."""
        pins = self._device.type == "cuda"
        if pins and self.nbytes:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())))
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._memory = torch.empty(size, dtype=torch.uint8)
        if pins:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)))


def _copy(to: Tensor, values: Tensor) -> None:
    """By numpy, on this thread alone: torch would start a team of threads for it, beside that of training."""
    if values.is_contiguous():
        np.copyto(as_bytes(to), as_bytes(values))
    else:
        to.copy_(values)


def _copy_from_gpu(
    device: torch.device, begun: torch.cuda.Event, items: Sequence[Item], copies: Sequence[Item]
) -> None:
    stream = torch.cuda.Stream(device)  # a thread begins on the first GPU
    with torch.cuda.stream(stream):
        stream.wait_event(begun)
        for item, copy in zip(items, copies, strict=True):
            copy.values.copy_(item.values, non_blocking=True)
    stream.synchronize()
