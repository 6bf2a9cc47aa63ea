"""What a run would allocate on a rank, found by building it and stepping through it on the meta device.

Nothing here repeats what the engine does: weights, gradients, optimizer state and buffers are the tensors that
`assemble` makes, and activations those that forward and backward of the stage make, counted while they live: those
that native kernels and fused attention make, unless kernels is reference. Temporaries inside a kernel are not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Batch
from engine.assemble import Assembly, assemble
from engine.config import Config
from model import build_layers
from parallel.grid import GridShape, planned_grid
from parallel.pipeline.actions import live_activations
from parallel.tensor import LOSSES

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank.

    Attributes:
        stage: of the pipeline. states: what lives for the whole run, by what it is. activations: the most that forward
            and backward hold beside it, gradients on their way from one layer to the next included.
        micro_batches: whose activations are alive at once.
    """

    stage: int
    states: dict[str, int]
    activations: int
    micro_batches: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.states.values()) + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within, while they live.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known | self._known:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def states(assembly: Assembly) -> dict[str, int]:
    """Bytes of what lives for the whole run."""
    held = assembly.store.memory()
    held["optimizer state"] = sum(t.nbytes for group in assembly.optimizer.state_tensors().values() for t in group)
    if assembly.average is not None:
        held["weight average"] = sum(t.nbytes for t in assembly.average.averages)
    return held


def plan_memory(config: Config, shape: GridShape, rank: int, device_memory: float) -> MemoryPlan:
    """What `rank` of a world of this shape would hold.

    Args:
        config: resolved for that world. device_memory: bytes of a rank's device, which
            parallel.reshard_after_forward: auto looks at.
    """
    if config.kernels != "reference":
        config = replace(config, kernels="native")  # the shapes of what they make are known without them
    grid = planned_grid(shape, rank)
    assembly = assemble(config, grid, META, build_layers(config.model), device_memory=device_memory)
    live = max(live_activations(assembly.schedule, grid.pipeline.index), default=0)
    return MemoryPlan(
        stage=grid.pipeline.index,
        states=states(assembly),
        activations=_activation_bytes(assembly, live),
        micro_batches=live,
    )


def _activation_bytes(a: Assembly, live: int) -> int:
    """Peak of one forward and backward of this rank's stage, what is kept of the other live micro-batches, and the
    images of one.
    """
    batch = a.to_device(_batch(a), training=True)
    own = a.stages[a.grid.pipeline.index]
    a.store.gradients.start(1)
    with LiveBytes() as counter:
        inputs: tuple[Tensor, ...] = ()
        if own.start:
            spec = a.boundaries[a.grid.pipeline.index][0]
            inputs = (torch.empty(spec.shape, dtype=spec.dtype, device=META, requires_grad=True),)
        (y,) = a.module(inputs, batch)
        kept = counter.now
        if a.is_last_stage:
            loss = LOSSES[a.config.train.loss](y, batch.labels, a.config.model.sizes.classes, a.grid.tensor)
            loss.sum().backward()
        else:
            y.backward(torch.empty_like(y))
    images = 0 if batch.images is None else batch.images.nbytes
    return counter.peak + (live - 1) * kept + images


def _batch(a: Assembly) -> Batch:
    size, sizes = a.config.train.micro_batch_size, a.config.model.sizes
    assert size is not None
    images = torch.empty(size, sizes.channels, *sizes.image, device=META) if a.holds_images else None
    zeros = torch.zeros(size, dtype=torch.int64, device=META)
    return Batch(images=images, labels=zeros, sample_ids=zeros, weights=torch.ones(size, device=META))
