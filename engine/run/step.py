"""One training step and one evaluation, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import Batch
from engine.assembly import Assembly
from engine.objectives.base import JointObjective
from engine.run.bubble import BubbleMeter
from engine.run.decode_sharing import completed
from engine.run.diagnose import Watch, first_culprit, watch
from engine.run.joint import HeldBatches, JointStep, Pass, Told
from engine.run.transfer import Transfer, transfer_to
from model import MicroBatch, Shares
from parallel import comm
from parallel.distillation import end_step

Votes = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch. grad_norm: global, before clipping.
        skipped: whether nothing was updated because loss or gradient was not finite.
        loss_scale: that this step was taken with.
        bad: skipped for a reason that a smaller loss scale does not cure. culprit: what was not finite first, if bad.
        votes: what all ranks brought to the step, added up.
        targets: the loss of each of the objective's, where they are told.
        bubble: share of the pass in which ranks did not compute; None without a pipeline, or where it was not measured.
    """

    loss: float
    grad_norm: float
    skipped: bool
    loss_scale: float = 1.0
    bad: bool = False
    culprit: str | None = None
    votes: tuple[float, ...] = ()
    targets: Mapping[str, float] = field(default_factory=dict)
    bubble: float | None = field(default=None, compare=False)


class Totals(NamedTuple):
    """Of a step: mean loss over the global batch, global gradient norm, the loss of each target, votes."""

    loss: float
    norm: float
    targets: Mapping[str, float]
    votes: tuple[float, ...]


class _OnDevice(Sequence[MicroBatch]):
    """Micro-batches, each moved to the device when its forward comes: a step's images may be gigabytes.

    A rank asks once for each of its stages, and with several of them for others in between. Where the first alone reads
    images, what the others need is kept, and no image is read again.
    """

    def __init__(
        self, assembly: Assembly, transfer: Transfer, batches: Sequence[Batch], shares: Shares | None = None
    ) -> None:
        self._assembly, self._transfer, self._batches, self._shares = assembly, transfer, batches, shares
        self._moved: tuple[int, MicroBatch] | None = None
        self._without_images: dict[int, MicroBatch] = {}
        self._keeps = len(assembly.stages) > 1 and not assembly.later_stages_read_images

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, m: Any) -> Any:
        if self._moved is None or self._moved[0] != m:
            self._moved = m, self._without_images.get(m) or self._move(m)
        return self._moved[1]

    def _move(self, m: int) -> MicroBatch:
        with self._assembly.grid.meter.where.during(f"reading images of micro-batch {m}"):
            batch = self._batches[m]
            moved = self._transfer.move(batch, partial(self._assembly.to_device, training=True))
            moved = replace(completed(moved, batch, self._assembly), shares=self._shares)
        if self._keeps:
            self._without_images[m] = replace(moved, images=None)
        return moved


class Stepper:
    """Runs training steps and evaluations on what `assemble` built.

    Attributes:
        before_change: called before anything of the state is changed. meter: of the bubble; it has the recorder.
        transfer: moves micro-batches to the device.
    """

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.before_change: Callable[[], None] = lambda: None
        self.meter, self.transfer = BubbleMeter(assembly.grid, assembly.device), transfer_to(assembly.device)
        self._train = assembly.executor(assembly.schedule)
        joint = assembly.objective
        self._joint = JointStep(assembly, joint, self._train) if isinstance(joint, JointObjective) else None
        self._shares: Shares | None = None  # of the targets of this step
        self._eval = cache(assembly.forwards)

    def train_step(
        self, batches: Sequence[Batch], lr: float, lr_factor: float = 1.0, votes: Votes = lambda: ()
    ) -> StepResult:
        """Forward and backward of every micro-batch, reduction, unscaling and check, clipping, update.

        Args:
            batches: this data rank's micro-batches. lr: learning rate of this step. lr_factor: the schedule's part of
            it, for decay that does not depend on the peak rate. votes: asked for at the end of the step: numbers of
            this rank, as many on each, which are added up with the loss.
        """
        a = self.assembly
        scale = self._scale
        self.meter.begin()
        if a.keys is not None:  # which change places with the weights
            self.before_change()
        loss, norm, targets, total = self._forward_backward(batches, lambda: (*votes(), *self.meter.votes()))
        total, bubble = self.meter.end(total)
        self.before_change()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return replace(self._skip(batches, loss, norm), votes=total, bubble=bubble)
        o = a.config.optimizer
        a.grid.meter.where.now("optimizer")
        self._finish_precision(overflow=False)
        self._end_moments(counts=True)
        factor = clip_factor(norm, o.clip_grad) / scale
        a.optimizer.update(
            lr=lr, grad_factor=factor, decay_factor=lr_factor if o.decay_by == "schedule" else None
        )  # fmt: skip
        a.store.updated()
        for average in a.averages:
            average.update()
        if self._joint is not None:
            self._joint.taken()
        return StepResult(loss, norm, skipped=False, loss_scale=scale, votes=total, targets=targets, bubble=bubble)

    def _forward_backward(
        self, batches: Sequence[Batch], votes: Votes = lambda: (), watching: Watch | None = None
    ) -> Totals:
        """Of the whole step, unscaled; the sums of the gradients are left in the store."""
        gradients = self.assembly.store.gradients
        gradients.start(len(batches))
        losses = self._passes(batches, watching)
        self.assembly.grid.meter.where.now("finishing gradients")
        gradients.finish()
        self.assembly.grid.meter.where.now("adding up loss and norm")
        return self._totals(losses, votes())

    def _passes(self, batches: Sequence[Batch], watching: Watch | None) -> list[Tensor]:
        """Forward and backward of all micro-batches: shares of the loss, on ranks that hold the last layer."""
        a = self.assembly
        self._end_moments(counts=False)  # of a step that was skipped
        scale = self._scale / a.config.train.global_batch_size
        self._shares = Shares(scale=scale) if a.objective.targets else None
        if self._joint is None:
            here = _OnDevice(a, self.transfer, batches, self._shares)
            if watching is None:
                return self._train.run(here, self._loss_share)
            return self._train.run(watching.batches(here), watching.loss(self._loss_share))
        held = HeldBatches(batches) if self._joint.reads_twice else batches

        def fresh(of: Pass) -> Sequence[MicroBatch]:
            here: Sequence[MicroBatch] = _OnDevice(a, self.transfer, held, self._shares if of == "gradients" else None)
            here = here if of == "gradients" else Told(here, of)
            return here if watching is None else watching.batches(here)

        return self._joint.run(fresh, self._scale, watching, self._shares)

    def _skip(self, batches: Sequence[Batch], loss: float, norm: float) -> StepResult:
        """Change nothing but the loss scale; if that cannot be what is wrong, find out what is."""
        a = self.assembly
        scale, bad = (1.0, True) if a.scaler is None else (a.scaler.scale, a.scaler.at_minimum)
        culprit = self._diagnose(batches) if bad else None
        self._finish_precision(overflow=True)
        return StepResult(loss, norm, skipped=True, loss_scale=scale, bad=bad, culprit=culprit)

    def _diagnose(self, batches: Sequence[Batch]) -> str:
        """What was not finite first, found by running the step's micro-batches again. Collective."""
        a = self.assembly
        a.grid.meter.where.listener = None  # what is run again is no part of the step's times
        unrecorded = a.fp8.unrecorded() if a.fp8 is not None else nullcontext()
        with unrecorded, watch(a.stages.values(), a.layers, a.grid.data.index) as watching:
            self._forward_backward(batches, watching=watching)
        culprit = first_culprit(watching.found, a.grid.world, joint=self._joint is not None)
        return culprit.describe() if culprit else "the sum of the gradients, each of them finite"

    def _finish_precision(self, overflow: bool) -> None:
        """Let loss scale and fp8 scales follow what this step has shown. Collective."""
        a = self.assembly
        if a.scaler is not None:
            a.scaler.update(overflow)
        if a.fp8 is not None:
            a.fp8.finish_step(a.store.axis)

    def _end_moments(self, *, counts: bool) -> None:
        """Let what teachers have given count in the steps to come. Collective, if it does."""
        a = self.assembly
        end_step(list(a.moments.values()), a.grid.along("data", "context"), counts=counts)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The objective's figures over all batches of all data ranks; images of weight 0 do not count."""
        a = self.assembly
        evaluation = a.objective.evaluation(a.grid, a.device)
        stream, where = iter(batches), a.grid.meter.where
        while group := list(where.each(islice(stream, 4 * a.grid.pipeline.size), "reading images")):  # bounded memory
            to_device = partial(a.to_device, training=False)
            micro_batches = [completed(self.transfer.move(batch, to_device), batch, a) for batch in group]
            evaluation.add(self._eval(len(group)).run(micro_batches, evaluation.look))
        figures = evaluation.figures(holds_loss=a.holds_loss)
        self.meter.met()
        return figures

    def evaluate_average(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The same with the moving average of the weights, which must be kept (`optimizer.ema_decay`)."""
        a = self.assembly
        assert a.average is not None
        self.before_change()
        with a.average.applied():
            self._forget_rounded()
            result = self.evaluate(batches)
        self._forget_rounded()
        return result

    def _forget_rounded(self) -> None:
        """The weights are others now: no copy in 8 bits holds."""
        if self.assembly.fp8 is not None:
            self.assembly.fp8.forget_weights()

    @property
    def _scale(self) -> float:
        """That of the loss."""
        return self.assembly.scaler.scale if self.assembly.scaler else 1.0

    @property
    def _reports(self) -> bool:
        """Whether this rank's losses count: one tensor rank; each context rank has its share of the loss."""
        a = self.assembly
        return a.holds_loss and a.grid.tensor.index == 0

    def _loss_share(self, outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """The micro-batch's share of the loss, times the loss scale."""
        return self.assembly.objective.loss_share(outputs, batch, self.assembly.grid, self._scale)

    def _totals(self, losses: Sequence[Tensor], votes: Sequence[float]) -> Totals:
        """In one small all-reduce over the world.

        The norm counts each logical gradient element once: on the rank whose shard it is in, and of copies over tensor
        ranks on the first.
        """
        a, names = self.assembly, self.assembly.objective.targets
        stats = torch.tensor([0.0, 0.0, *[0.0] * len(names), *votes], dtype=torch.float64, device=a.device)
        if self._reports:
            stats[0] = torch.stack(list(losses)).sum(dtype=torch.float64)
        stats[1] = a.store.gradients.squared_norm()
        found = {} if self._shares is None else self._shares.found
        for place, name in enumerate(names, 2):
            if name in found:
                stats[place] = found[name]
        loss, squared, *total = comm.all_reduce(stats, a.grid.world).tolist()
        scale = self._scale
        targets = {name: share / scale for name, share in zip(names, total, strict=False)}
        at_depth = sum(targets.get(name, 0.0) for name in a.objective.at_depth)
        return Totals(loss / scale + at_depth, math.sqrt(squared) / scale, targets, tuple(total[len(names) :]))


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of global norm `norm` are multiplied by so that it is at most `limit` (0: no limit)."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
