"""Features of a whole data set: the pipeline's forward pass over it, each sample once, and its outputs shared out.

Data ranks take micro-batches in turn, and ranks of one model replica compute one together, in whatever layout. After
every few of them what has come out goes to the ranks that hold those samples (`rows.py`), so that no rank ever has
more than its share and those few. Who sends how much to whom follows from the numbers of the samples: nobody asks.

Legend: N samples, B of a micro-batch, D features, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data import Batch
from engine.assembly import Assembly
from engine.errors import ConfigError
from engine.evaluation.rows import Indices, Rows, owners
from model import MicroBatch
from parallel import comm
from parallel.layout import split_range

Outputs = Callable[[tuple[Tensor, ...], MicroBatch], Tensor]
"""The last layer's outputs of a micro-batch -> what is wanted of them, [B, D], alike on tensor and context ranks."""


class Extractor:
    """Runs data through a model in evaluation. Makes an executor for each number of micro-batches once.

    Args:
        assembly: of whatever objective. outputs: what is wanted. width: D.
    """

    def __init__(self, assembly: Assembly, outputs: Outputs, width: int) -> None:
        self.assembly, self.outputs, self.width = assembly, outputs, width
        self._executor = cache(assembly.forwards)

    def rows(self, batches: Iterable[Batch], total: int, what: str) -> Rows:
        """Features of all samples of a stream, as `data.EvalStream` deals it. Collective.

        Args:
            total: N. what: the samples are, for messages.

        Raises:
            ConfigError: on every rank, if a feature is NaN or infinite.
        """
        a = self.assembly
        world, micro = a.grid.world, a.config.train.micro_batch_size
        assert micro is not None
        first, last = split_range(total, world.size, world.index)
        values = torch.zeros(last - first, self.width, device=a.device)
        stream, start = iter(batches), 0
        while group := list(islice(stream, 4 * a.grid.pipeline.size)):
            moved = [a.to_device(batch, training=False) for batch in group]
            outputs = self._executor(len(group)).run(moved, self.outputs)
            dealt = _Dealt(total, micro, a.grid.data.size, start, len(group))
            self._hand_out(outputs, dealt, values, first)
            start += len(group)
        self._check(values, first, what)
        return Rows(values, total, world)

    def _hand_out(self, outputs: Sequence[Tensor], dealt: _Dealt, values: Tensor, first: int) -> None:
        """Give what has come out here to those who hold it, and take what is ours into its place."""
        a = self.assembly
        world = a.grid.world
        senders = {self._sender(data): dealt.of(data) for data in range(a.grid.data.size)}
        out = values.new_empty(0, self.width)
        send = [0] * world.size
        if world.index in senders:
            indices = senders[world.index]
            out = torch.cat([x.float() for x in outputs])[: len(indices)]  # padding is last
            send = np.bincount(owners(indices, dealt.total, world.size), minlength=world.size).tolist()
        own = [senders.get(rank, _NONE) for rank in range(world.size)]
        own = [indices[(indices >= first) & (indices < first + len(values))] for indices in own]
        came = comm.all_to_all_rows(out, send, [len(indices) for indices in own], world)
        values[torch.from_numpy(np.concatenate(own) - first).to(values.device)] = came

    def _sender(self, data: int) -> int:
        """The rank that gives out what the replica `data` has computed: one of those that hold the last stage."""
        a = self.assembly
        wanted = {"pipeline": a.placement.ranks[a.placement.last], "data": data, "context": 0, "tensor": 0}
        shape = a.grid.shape
        return next(rank for rank in range(shape.world_size) if shape.coordinates(rank) == wanted)

    def _check(self, values: Tensor, first: int, what: str) -> None:
        bad = (~values.isfinite().all(1)).nonzero()[:, 0]
        own = torch.tensor(
            [float(bad[0]) + first if len(bad) else torch.inf], dtype=torch.float64, device=values.device
        )
        worst = comm.all_reduce(own, self.assembly.grid.world, "min").item()
        if worst < torch.inf:
            raise ConfigError(
                f"the features of {what} {int(worst)} are not finite: the weights have diverged, or overflow in "
                f"precision.dtype {self.assembly.config.precision.dtype}: try --precision.dtype fp32"
            )


_NONE = np.zeros(0, dtype=np.int64)


class _Dealt:
    """Which samples are in `count` micro-batches of each data rank, from its micro-batch `start` on."""

    def __init__(self, total: int, micro: int, data_size: int, start: int, count: int) -> None:
        self.total, self.micro, self.data_size, self.start, self.count = total, micro, data_size, start, count

    def of(self, data: int) -> Indices:
        """Of one data rank, ascending; padding left out."""
        batches = np.arange(self.start, self.start + self.count) * self.data_size + data
        indices = (batches[:, None] * self.micro + np.arange(self.micro)).reshape(-1)
        return indices[indices < self.total]
