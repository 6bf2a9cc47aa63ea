"""What a run would allocate on a rank, found by building it and stepping through it on the meta device.

Nothing here repeats what the engine does: weights, gradients, optimizer state and buffers are the tensors that
`assemble` makes, and activations those that forward and backward of the stage make, counted while they live: those
that native kernels and fused attention make, unless kernels is reference. Temporaries inside a kernel are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Batch
from engine.assemble import Assembly, assemble
from engine.config import Config
from model import MicroBatch
from parallel.grid import GridShape, planned_grid
from parallel.pipeline.actions import ActionKind, peak_activations

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank.

    Attributes:
        stages: of the pipeline, that the rank holds. states: what lives for the whole run, by what it is.
        activations: the most that forward and backward hold beside it, gradients on their way from one layer to the
            next included.
        micro_batches: whose activations are alive at once. schedule: its name. bubble: of the pipeline, as simulated.
    """

    stages: tuple[int, ...]
    states: dict[str, int]
    activations: int
    micro_batches: float
    schedule: str
    bubble: float

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.states.values()) + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within, while they live.

    Attributes:
        now, peak: bytes. alive: storages, by identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known | self.alive:
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
    assembly = assemble(config, grid, META, device_memory=device_memory)
    return MemoryPlan(
        stages=tuple(assembly.stages),
        states=states(assembly),
        activations=_activation_bytes(assembly),
        micro_batches=peak_activations(assembly.schedule)[grid.pipeline.index],
        schedule=assembly.schedule.name,
        bubble=assembly.predicted.bubble_fraction,
    )


@dataclass(frozen=True)
class _Measured:
    """Bytes of one micro-batch on one stage: what is kept after an action, and the most that is held meanwhile."""

    kept: dict[ActionKind, int]
    most: dict[ActionKind, int]


def _activation_bytes(a: Assembly) -> int:
    """The most that the schedule makes of one forward and backward of a stage, what is kept of the others that are
    alive then, and the images of one micro-batch.
    """
    batch = a.to_device(_batch(a), training=True)
    program = a.schedule.ranks[a.grid.pipeline.index]
    splits = {action.stage for action in program if action.kind is ActionKind.BACKWARD_INPUT}
    ahead = {(action.stage, action.micro_batch) for action in program if action.kind is ActionKind.RECOMPUTE}
    passes = {(number, False) for number in a.stages} | {(stage, True) for stage, _ in ahead}
    measured = {
        (number, again): _one_pass(a, number, batch, splits=number in splits, again=again) for number, again in passes
    }
    kept, now, most = dict[tuple[int, int | None], int](), 0, 0
    for action in program:
        if not action.kind.is_compute:
            continue
        key = action.stage, action.micro_batch
        of = measured[action.stage, key in ahead]
        now -= kept.pop(key, 0)
        most = max(most, now + of.most[action.kind])
        if action.kind in of.kept:
            kept[key] = of.kept[action.kind]
            now += kept[key]
    images = 0 if batch.images is None else batch.images.nbytes
    return most + images


def _one_pass(a: Assembly, stage: int, batch: MicroBatch, *, splits: bool, again: bool) -> _Measured:
    """What forward and backward of a stage make.

    Args:
        splits: whether its backward is in two parts. again: whether what was dropped is recomputed ahead of it.
    """
    a.store.gradients.start(1)
    noting = a.recomputer.noting() if again and a.recomputer else nullcontext(list[Callable[[], None]]())
    with LiveBytes() as counter:
        inputs = tuple(
            torch.empty(spec.shape, dtype=spec.dtype, device=META, requires_grad=spec.carries_gradient)
            for spec in a.boundaries[stage]
        )
        with noting as dropped:
            outputs = a.stages[stage](inputs, batch)
        if last := stage == a.placement.last:
            outputs = (a.objective.loss_share(outputs, batch, a.grid, 1.0),)
        most = {ActionKind.FORWARD: counter.restart()}
        roots = [get_gradient_edge(y) for y in outputs if y.requires_grad]  # none behind a frozen front
        like = [(y.shape, y.dtype) for y in outputs if y.requires_grad]
        del outputs  # they are freed when they are sent
        kept = {ActionKind.FORWARD: counter.now}
        for call in dropped:
            call()
        most[ActionKind.RECOMPUTE], kept[ActionKind.RECOMPUTE] = counter.restart(), counter.now
        with a.store.gradients.deferring() if splits else nullcontext() as products:
            torch.autograd.backward(
                roots, [None if last else torch.empty(shape, dtype=dtype, device=META) for shape, dtype in like]
            )
        most[ActionKind.BACKWARD] = most[ActionKind.BACKWARD_INPUT] = counter.restart()
        if products is not None:
            del inputs, roots
            kept[ActionKind.BACKWARD_INPUT] = counter.now
            for product in products:
                product()
            most[ActionKind.BACKWARD_WEIGHT] = counter.restart()
    return _Measured(kept, most)


def _batch(a: Assembly) -> Batch:
    size, sizes = a.config.train.micro_batch_size, a.config.model.sizes
    assert size is not None
    images = torch.empty(size, sizes.channels, *sizes.image, device=META) if a.holds_images else None
    zeros = torch.zeros(size, dtype=torch.int64, device=META)
    return Batch(images=images, labels=zeros, sample_ids=zeros, weights=torch.ones(size, device=META))
