"""An exponential moving average of the weights, in fp32, sharded as the optimizer's state is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel.sharding import ParameterStore, StatePiece

_CHUNK = 1 << 22  # elements exchanged at once


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after each step that was not skipped (Polyak and Juditsky
    1992), corrected for its start as Adam's moments are (Kingma and Ba 2015): the mean of the weights after updates 1
    to t, that after update s weighing decay^(t - s). The initial weights, which stand here until the first update,
    have no part in it.

    The corrected average of t updates is that of t - 1, moved towards the weights by `rate`: so what is kept is what
    is used, and is as the weights are: one array beside each master, a piece of the same logical tensors.

    Not corrected it is the recursion itself, from the initial weights on: the key encoder of He et al. 2020 (MoCo).

    Args:
        store: whose trained weights are averaged, as far as this rank trains them; maybe none. decay: per step. name:
            of the state. corrected: for its start.

    Attributes:
        averages: beside the trained masters of `store.buckets`, one by one. updates: taken in so far.
    """

    def __init__(self, store: ParameterStore, decay: float, *, name: str = "average", corrected: bool = True) -> None:
        self.store, self.decay, self.name, self.updates = store, decay, name, 0
        self._corrected = corrected
        self._buckets = [bucket for bucket in store.buckets if bucket.kind.trains]
        self._masters = [bucket.master for bucket in self._buckets]
        self.averages = [master.clone() for master in self._masters]

    def restart(self) -> None:
        """Begin from the weights as they are now."""
        self.updates = 0
        for average, master in zip(self.averages, self._masters, strict=True):
            average.copy_(master)

    def update(self) -> None:
        """Take in the weights as they are now."""
        self.updates += 1
        if self.averages:
            torch._foreach_lerp_(self.averages, self._masters, self.rate)

    def pieces(self) -> Iterator[StatePiece]:
        """The averages as pieces of logical tensors."""
        return self.store.pieces(self.name, dict(zip(self._buckets, self.averages, strict=True)))

    @property
    def rate(self) -> float:
        """What the newest of all weights so far weighs: 1 at first, then falling to 1 - decay; that always, where the
        average is not corrected."""
        return 1 - self.decay if not self._corrected else (1 - self.decay) / (1 - self.decay**self.updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages within, and afterwards with the very weights it had. Collective."""
        self._swap()
        yield
        self._swap()  # not after a failure: the others would not join in

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.averages, self._masters, strict=True):
            for a, b in zip(average.split(_CHUNK), master.split(_CHUNK), strict=True):
                _exchange(a, b)
        self.store.round_weights()
        self.store.updated()


def _exchange(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
