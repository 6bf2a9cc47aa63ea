"""Ranks of later pipeline stages are told by the first which samples micro-batches are of (data.relay)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from data import Relay
from engine.assembly import Assembly
from parallel.comm import Axis
from parallel.messages import Exchange, exchange_start, open_on_host


def sample_relay(assembly: Assembly) -> Relay | None:
    """That of this rank's pipeline; None: nobody has to be told. Collective along the pipeline axis."""
    a = assembly
    if a.grid.pipeline.size == 1 or not a.config.data.mends:
        return None
    return _PipelineRelay(open_on_host(a.grid.pipeline), a.placement.ranks[0])


class _PipelineRelay(Relay):
    """A small message for each micro-batch, beside those of the pipeline, on the host.

    Args:
        axis: the ranks of a pipeline. first: index of the one with the first stage, which decodes.
    """

    def __init__(self, axis: Axis, first: int) -> None:
        self._axis, self._first = axis, first
        self._others = [index for index in range(axis.size) if index != first]
        self._sent: list[Exchange] = []

    @property
    def decides(self) -> bool:
        """As Relay."""
        return self._axis.index == self._first

    def pass_on(self, number: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """As Relay. Stages may ask in different orders, so micro-batches have a tag each."""
        values = torch.from_numpy(indices.copy())
        if self.decides:
            self._sent.append(exchange_start([(values, to) for to in self._others], [], self._axis, tag=number))
        else:
            exchange_start([], [(values, self._first)], self._axis, tag=number).wait()
        return values.numpy()

    def begin(self) -> None:
        """As Relay."""
        for exchange in self._sent:
            exchange.wait()
        self._sent.clear()
