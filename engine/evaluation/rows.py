"""Features of a whole set of samples, shared out over ranks in the order of the samples.

Rank r of W holds a contiguous range of the samples, as even as can be, whatever layout computed them. So what is
decided by the number of a sample (which is a neighbour before another, which are held out, which make up a batch) is
the same on any number of ranks, and none holds more than its share.

Legend: N samples, n of them on this rank, D features, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel import comm
from parallel.comm import Axis
from parallel.layout import split_range
from parallel.messages import exchange_start

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a matrix of N x D.

    Attributes:
        values: [n, D]. total: N. axis: the ranks that share them.
    """

    values: Tensor
    total: int
    axis: Axis

    @staticmethod
    def dealt(values: Tensor, numbers: Tensor, axis: Axis) -> Rows:
        """Of rows that lie on any ranks in any order, each sample once, in the order of their numbers. Collective.

        Args:
            values: those of this rank, [m, D]. numbers: of their samples, int64 [m].
        """
        size = axis.size
        total = int(comm.all_reduce(numbers.new_tensor([len(numbers)]), axis))
        end = numbers.new_tensor([int(numbers.max()) + 1 if len(numbers) else 0])
        if int(comm.all_reduce(end, axis, "max")) > total:
            every = np.sort(np.concatenate(comm.gather_objects(numbers.cpu().numpy(), axis)))  # some were left out
            numbers = torch.from_numpy(np.searchsorted(every, numbers.cpu().numpy())).to(numbers.device)
        at = owners(numbers.cpu().numpy(), total, size)
        send = np.bincount(at, minlength=size)
        receive = comm.all_gather_rows(torch.from_numpy(send).to(values.device)[None], axis)[:, axis.index].tolist()
        order = torch.from_numpy(np.argsort(at, kind="stable")).to(values.device)
        came, places = (comm.all_to_all_rows(x[order], send.tolist(), receive, axis) for x in (values, numbers))
        own = torch.empty_like(came)
        own[places - split_range(total, size, axis.index)[0]] = came
        return Rows(own, total, axis)

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.span), (self.values.shape, self.span)

    @property
    def span(self) -> range:
        """Numbers of the samples on this rank."""
        return range(*split_range(self.total, self.axis.size, self.axis.index))

    @property
    def width(self) -> int:
        """D."""
        return self.values.shape[1]

    def replace(self, values: Tensor) -> Rows:
        """Others in the place of these, [n, any]."""
        return Rows(values, self.total, self.axis)

    def normalised(self) -> Rows:
        """Each of length 1, as it enters a cosine (a row of zeros stays)."""
        return self.replace(torch.nn.functional.normalize(self.values, dim=1))

    def own(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(places in `indices`, places in `values`) of those of the samples that are here, on the values' device."""
        here = (indices >= self.span.start) & (indices < self.span.stop)
        places = np.flatnonzero(here)
        device = self.values.device
        return torch.from_numpy(places).to(device), torch.from_numpy(indices[places] - self.span.start).to(device)

    def gather(self, indices: Indices) -> Tensor:
        """The rows of some samples, in their order, on every rank: [len(indices), D]. Collective.

        Each row comes from one rank and nothing from the others, so a sum brings the very bits.
        """
        out = self.values.new_zeros(len(indices), self.width)
        at, from_ = self.own(indices)
        out[at] = self.values[from_]
        return comm.all_reduce(out, self.axis)

    def select(self, indices: Indices) -> Rows:
        """The rows of some samples, in ascending order, as a set of its own, shared out anew. Collective."""
        axis, size = self.axis, self.axis.size
        _, from_ = self.own(indices)
        at = owners(indices, self.total, size)  # the rank that has each
        send = np.bincount(owners(np.flatnonzero(at == axis.index), len(indices), size), minlength=size)
        receive = np.bincount(at[slice(*split_range(len(indices), size, axis.index))], minlength=size)
        values = comm.all_to_all_rows(self.values[from_], send.tolist(), receive.tolist(), axis)
        return Rows(values, len(indices), axis)

    def around(self) -> Iterator[tuple[range, Tensor]]:
        """(numbers of the samples, rows) of this rank, then of the one before it, and so on: the ring of all shares.

        The next share is on its way while this one is worked on. Collective: every rank must take all of them. What is
        yielded is to be let go of before the next is asked for.
        """
        axis, size = self.axis, self.axis.size
        spans = [range(*split_range(self.total, size, rank)) for rank in range(size)]
        here = self.values.contiguous()
        for step in range(size):
            source = (axis.index - step) % size
            if step == size - 1:
                yield spans[source], here
                return
            coming = here.new_empty(len(spans[(source - 1) % size]), self.width)
            to, from_ = (axis.index + 1) % size, (axis.index - 1) % size
            sends, receives = [(here, to)] * bool(len(here)), [(coming, from_)] * bool(len(coming))
            moving = exchange_start(sends, receives, axis) if sends or receives else None
            yield spans[source], here
            if moving is not None:
                moving.wait()
            here = coming


def owners(indices: Indices, total: int, size: int) -> Indices:
    """The rank that holds each of these samples."""
    stops = np.array([split_range(total, size, rank)[1] for rank in range(size)])
    return np.searchsorted(stops, indices, side="right")
