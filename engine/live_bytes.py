"""Counts the bytes of tensors while they live, on whatever device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.flops import EagerMode


class LiveBytes(EagerMode):
    """Counts the bytes of tensors made within, while they live.

    Attributes:
        now, peak: bytes. alive: storages, by identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_memory(x) for x in _leaves((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _leaves(out):
            if isinstance(tensor, Tensor) and (at := _memory(tensor)) not in known and at not in self.alive:
                self._add(tensor)
        return out

    def restart(self) -> int:
        """The peak, which is what is alive now from now on."""
        peak, self.peak = self.peak, self.now
        return peak

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def _leaves(of: Any) -> Iterator[Any]:
    """What operators are given and give, lists of tensors at most: this is called for each."""
    if isinstance(of, tuple | list):
        for part in of:
            yield from _leaves(part)
    elif isinstance(of, dict):
        yield from _leaves(list(of.values()))
    else:
        yield of


def _memory(x: Any) -> int | None:
    """Of which storage a tensor is, or which this is."""
    storage = x.untyped_storage() if isinstance(x, Tensor) else x
    return storage._cdata if isinstance(storage, torch.UntypedStorage) else None
