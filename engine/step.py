"""One training step and one evaluation, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from data import Batch
from engine.assemble import Assembly
from engine.optimizer import clip_factor
from model import MicroBatch
from parallel import comm
from parallel.pipeline import forward_only, insert_communication
from parallel.pipeline.execution import PipelineExecutor
from parallel.tensor import LOSSES, top_class


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch. grad_norm: global, before clipping.
        skipped: whether nothing was updated because loss or gradient was not finite.
    """

    loss: float
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class EvalResult:
    """Means over the held-out images, the same on every rank. images: how many there were, each counted once."""

    loss: float
    accuracy: float
    images: int


class Stepper:
    """Runs training steps and evaluations on what `assemble` built."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self._train = assembly.executor(assembly.schedule)
        self._loss = LOSSES[assembly.config.train.loss]
        self._classes = assembly.config.model.sizes.classes
        self._eval = cache(self._eval_executor)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward and backward of every micro-batch, reduction, check, clipping, update.

        Args:
            batches: this data rank's micro-batches. lr: learning rate of this step.
        """
        a = self.assembly
        a.gradients.start_grad_sync(len(batches))
        losses = self._train.run([a.to_device(batch, training=True) for batch in batches], self._loss_share)
        a.gradients.finish_grad_sync()
        loss, norm = self._global_loss_and_norm(losses)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return StepResult(loss, norm, skipped=True)
        a.optimizer.update(lr=lr, grad_factor=clip_factor(norm, a.config.optimizer.clip_grad))
        a.gradients.gather_parameters()
        return StepResult(loss, norm, skipped=False)

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Loss and accuracy over all batches of all data ranks; images of weight 0 do not count."""
        a = self.assembly
        total = torch.zeros(3, dtype=torch.float64, device=a.device)
        stream = iter(batches)
        while group := list(islice(stream, 4 * a.grid.pipeline.size)):  # few at a time: bounded memory
            micro_batches = [a.to_device(batch, training=False) for batch in group]
            for counts in self._eval(len(group)).run(micro_batches, self._counts):
                total += counts
        if not self._reports or a.grid.context.index:
            total.zero_()
        loss, correct, images = comm.all_reduce(total, a.grid.world).tolist()
        return EvalResult(loss / images, correct / images, int(images))

    def _eval_executor(self, num_micro_batches: int) -> PipelineExecutor:
        order = forward_only(self.assembly.grid.pipeline.size, num_micro_batches)
        return self.assembly.executor(insert_communication(order))

    @property
    def _reports(self) -> bool:
        """Whether this rank's losses count: one tensor rank; each context rank has its share of the loss."""
        a = self.assembly
        return a.is_last_stage and a.grid.tensor.index == 0

    def _losses(self, outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """Loss of each image, 0 for padding: [B]."""
        return self._loss(outputs[0], batch.labels, self._classes, self.assembly.grid.tensor) * batch.weights

    def _loss_share(self, outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """This micro-batch's share of the global mean, in equal parts on the context ranks, which all compute it."""
        a = self.assembly
        return self._losses(outputs, batch).sum() / (a.config.train.global_batch_size * a.grid.context.size)

    def _counts(self, outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """(sum of losses, images classified right, images) of a micro-batch."""
        right = (top_class(outputs[0], self._classes, self.assembly.grid.tensor) == batch.labels) * batch.weights
        return torch.stack([self._losses(outputs, batch).sum(), right.sum(), batch.weights.sum()]).double()

    def _global_loss_and_norm(self, losses: Sequence[Tensor]) -> tuple[float, float]:
        """(mean loss over the global batch, global gradient norm), in one small all-reduce over the world.

        The norm counts each logical gradient element once: on the rank whose shard it is in, and of copies over tensor
        ranks on the first.
        """
        a = self.assembly
        stats = torch.zeros(2, dtype=torch.float64, device=a.device)
        if self._reports:
            stats[0] = torch.stack(list(losses)).sum()
        stats[1] = a.gradients.squared_norm(count_copies=a.grid.tensor.index == 0)
        loss, squared = comm.all_reduce(stats, a.grid.world).tolist()
        return loss, math.sqrt(squared)
