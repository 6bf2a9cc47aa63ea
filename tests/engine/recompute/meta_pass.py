"""A rank's whole pass over its schedule on the meta device, by the executor itself, messages out of nowhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch

from engine.assembly import Assembly
from engine.layer_costs import micro_batch
from engine.live_bytes import LiveBytes
from parallel.pipeline.boundary import Specs, routes_between_ranks
from parallel.pipeline.execution import PipelineExecutor
from parallel.pipeline.lanes import Lane, Post, Tensors


class _NoLane(Lane):
    """What is sent is gone at once; what is taken is made then."""

    def __init__(self, specs: Specs) -> None:
        self.specs, self._expected = specs, deque[int]()

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    def send(self, micro_batch: int, tensors: Tensors) -> None:
        assert [x.shape for x in tensors] == [spec.shape for spec in self.specs]

    def expect(self, micro_batch: int) -> None:
        self._expected.append(micro_batch)

    def has_arrived(self) -> bool:
        return True

    def take(self) -> Tensors:
        self._expected.popleft()
        return tuple(torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in self.specs)


class _NoPost(Post):
    carrier, bounded = "nothing", False

    def __init__(self, assembly: Assembly) -> None:
        routes = routes_between_ranks(assembly.placement.ranks, assembly.boundaries)
        self.lanes: Mapping[object, Lane] = {route: _NoLane(specs) for route, specs in routes.items()}  # type: ignore

    def wait_any(self, lanes: Sequence[Lane]) -> None:
        """Nobody waits."""

    def finish(self) -> None:
        """Everything is gone."""

    def close(self) -> None:
        """Nothing is held."""


def bytes_of_a_pass(a: Assembly) -> tuple[int, int]:
    """The most bytes alive in it, and those that are left."""
    executor = PipelineExecutor(
        a.schedule, a.stages, a.boundaries, axis=a.grid.pipeline, device=a.device, deferrer=a.store.gradients,
        recomputer=a.recomputer, before_run=a.store.plan if a.store.gatherer.units else None, post=_NoPost(a),
    )  # fmt: skip
    count = a.schedule.num_micro_batches
    batches = [a.to_device(micro_batch(a), training=True)] * count
    a.store.gradients.start(count)
    with LiveBytes() as counter:
        losses = executor.run(batches, lambda outputs, batch: a.objective.loss_share(outputs, batch, a.grid, 1.0))
        del losses
        a.store.gradients.finish()
        left = counter.now
    return counter.peak, left
