"""The queue of momentum contrast (He et al. 2020, MoCo): keys of batches before, of which each data rank holds a part.

A ring of K places; a batch's keys, those of the first rank first, take the places after the last batch's, over the
oldest keys. Which keys are held hangs on no layout, so that the queue is one logical tensor [K, E] for checkpoints, of
which a rank has consecutive rows.

Legend: n keys of this rank, N of all ranks, K places, k of them on this rank, E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm, random
from parallel.comm import Axis
from parallel.layout import Init, TensorLayout, split_range
from parallel.sharding.fragments import Holding
from parallel.sharding.pieces import StatePiece, whole_piece

_NAME = "contrastive.queue"


class KeyQueue:
    """Unit rows drawn by (seed, place) at first, as MoCo has them.

    Attributes:
        keys: fp32 [k, E], this rank's places.

    Raises:
        ValueError: fewer places than ranks.
    """

    def __init__(self, length: int, width: int, seed: int, axis: Axis, device: torch.device) -> None:
        if length < axis.size:
            raise ValueError(f"a queue of {length} keys over {axis.size} ranks: give it a place for each rank at least")
        self.length, self.axis = length, axis
        self._starts = [split_range(length, axis.size, rank)[0] for rank in range(axis.size)] + [length]
        start, stop = self._starts[axis.index : axis.index + 2]
        self._start = start
        self.keys = torch.empty(stop - start, width, device=device)
        own = TensorLayout(shape=(length, width), dim=0, segments=(length,), parts=axis.size, index=axis.index)
        random.fill(self.keys, own, Init(kind="normal", scales=(1.0,)), random.key(seed, _NAME))
        F.normalize(self.keys, dim=1, out=self.keys)
        self._next = torch.zeros(1, dtype=torch.int64)  # on the host: places are found there

    @property
    def position(self) -> int:
        """The place that the next key takes."""
        return int(self._next)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """The keys [n, E] of a batch, whatever n each rank has. Collective; keys are copied.

        Of a batch larger than the queue the last K keys stay.
        """
        keys = keys.detach().to(self.keys.dtype)
        rows = torch.tensor([keys.shape[0]], device=comm.device_of(self.axis))
        counts: list[int] = comm.all_gather_rows(rows, self.axis).tolist()
        first, total = sum(counts[: self.axis.index]), sum(counts)
        owners, order = self._owners(first, counts[self.axis.index], total).sort(stable=True)
        order = order[owners >= 0].to(keys.device)
        send = self._per_rank(owners)
        wanted = [self._places(sum(counts[:rank]), count, total) for rank, count in enumerate(counts)]
        places = torch.cat(wanted)
        arrived = comm.all_to_all_rows(keys[order], send, [len(part) for part in wanted], self.axis)
        self.keys[places.to(keys.device)] = arrived
        self._next += total
        self._next %= self.length

    def pieces(self) -> Iterator[StatePiece]:
        """What a checkpoint has of it: the keys, and the place of the next."""
        width = self.keys.shape[1]
        layout = TensorLayout(shape=(self.length, width))
        holders = [
            Holding(rank, layout, self._starts[rank] * width, self._starts[rank + 1] * width)
            for rank in range(self.axis.size)
        ]
        start, stop = self._start * width, self._start * width + self.keys.numel()
        yield StatePiece(
            f"{_NAME}/keys", layout, start, stop, slice(0, stop - start), self.keys.view(-1), self.axis, holders
        )
        yield whole_piece(f"{_NAME}/next", self._next, self.axis)

    def _owners(self, first: int, count: int, total: int) -> Tensor:
        """Of keys `first` on of a batch of `total` the ranks that hold their places; -1 of those that do not stay."""
        numbers = torch.arange(first, first + count)
        places = (self.position + numbers) % self.length
        owners = torch.bucketize(places, torch.tensor(self._starts[1:]), right=True)
        return owners.masked_fill_(numbers < total - self.length, -1)

    def _places(self, first: int, count: int, total: int) -> Tensor:
        """Of keys `first` on of a batch the places, counted from this rank's first, that are here."""
        numbers = torch.arange(max(first, total - self.length), max(first + count, total - self.length))
        places = (self.position + numbers) % self.length - self._start
        return places[(places >= 0) & (places < self.keys.shape[0])]

    def _per_rank(self, owners: Tensor) -> Sequence[int]:
        counts: list[int] = torch.bincount(owners[owners >= 0], minlength=self.axis.size).tolist()
        return counts
