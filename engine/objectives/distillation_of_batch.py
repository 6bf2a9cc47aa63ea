"""A student that learns how the images of a batch lie to each other, beside what else its teachers say of each.

Distances of pairs and angles of triplets (Park et al. 2019, relational knowledge distillation) are over all images of a
step, whichever micro-batch and data rank they are on: within micro-batches they would be another loss in each layout.
So the loss is a joint one, and a step takes two passes, or one whose schedule runs all forwards first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from data import Batch
from engine.config import Config
from engine.objectives.base import Evaluation, JointLoss, JointObjective, Keys, Outputs
from engine.objectives.distillation import Distillation
from model import LayerSpec, MicroBatch
from parallel.distillation import ROWS_AT_ONCE, angle_difference, distance_difference
from parallel.grid import Grid

_DIFFERENCES = {"distances": distance_difference, "angles": angle_difference}


@dataclass(frozen=True, kw_only=True)
class DistillationOfBatch(JointObjective):
    """What Distillation asks of each image, and relations between images.

    Attributes:
        each: of the images. layers, passes, targets, at_depth: as of JointObjective.
    """

    each: Distillation
    layers: tuple[LayerSpec, ...]
    passes: int
    targets: tuple[str, ...]
    at_depth = Distillation.at_depth

    @classmethod
    def of(cls, config: Config) -> Self:
        """As Objective."""
        each = Distillation.of(config)
        passes = 1 if config.distillation.passes == 1 else 2
        return cls(each=each, layers=each.layers, passes=passes, targets=each.targets)

    def stored(self, batch: Batch, *, training: bool) -> tuple[Mapping[str, Tensor], ...]:
        """As Objective."""
        return self.each.stored(batch, training=training)

    def joint_loss(
        self, outputs: Sequence[Outputs], batches: Sequence[MicroBatch], grid: Grid, keys: Keys | None = None
    ) -> JointLoss:
        """As JointObjective."""
        with torch.enable_grad():
            own = [student.detach().float().requires_grad_() for student, *_ in outputs]  # gradients are scaled later
            given = [(student, *others) for student, (_, *others) in zip(own, outputs, strict=True)]
            parts = self._of_each(given, batches, grid) | self._between(given, grid)
            loss = torch.stack(list(parts.values())).sum()
            gradients = torch.autograd.grad(loss, own)
        found = [
            (gradient, *[torch.zeros_like(x) for x in others])
            for gradient, (_, *others) in zip(gradients, outputs, strict=True)
        ]
        return JointLoss(loss.detach(), found, {name: part.detach() for name, part in parts.items()})

    def _of_each(self, given: Sequence[Outputs], batches: Sequence[MicroBatch], grid: Grid) -> dict[str, Tensor]:
        """By target, this data rank's share of the losses of images."""
        each = [self.each.losses(outputs, batch, grid) for outputs, batch in zip(given, batches, strict=True)]
        size = self.each.labels.global_batch_size
        return {name: torch.stack([losses[name].sum() for losses in each]).sum() / size for name in each[0]}

    def _between(self, given: Sequence[Outputs], grid: Grid) -> dict[str, Tensor]:
        """By target, this data rank's share of the losses between images."""
        own, *others = (torch.cat(parts) for parts in zip(*(self.each.pooled(x, grid) for x in given), strict=True))
        weights, found = self.each.config.relation_weights, dict[str, Tensor]()
        for name, difference in _DIFFERENCES.items():
            if name in weights:
                asked = zip(self.each.config.shares, others[::-1], strict=True)
                each = [share * difference(own, theirs, grid.data) for share, theirs in asked]
                found[name] = weights[name] * torch.stack(each).sum()
        return found

    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        """As Objective: of images alone."""
        return self.each.evaluation(grid, device)

    def describe(self) -> str:
        """As Objective."""
        how = "two passes, forwards twice" if self.passes == 2 else "one pass, all forwards first"
        return f"{self.each.describe()}; relations between all images of a step: {how}"

    def bytes_held(self, samples: int) -> int:
        """As Objective: what the last layer gives and the gradients of that, pooled features of all data ranks, and
        rows of distances, or angles of an image's triplets."""
        images = self.each.labels.global_batch_size
        widths = [layer.output[1] for layer in self.layers if layer.kind == "head"]
        worked = 4 * images * (images if "angles" in self.targets else min(images, ROWS_AT_ONCE))
        return 4 * (2 * samples * sum(widths) + 2 * images * sum(widths) + worked)
