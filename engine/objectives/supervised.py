"""Images and their classes: cross entropy, and the share of images classified right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.config import Config
from engine.objectives.base import AdditiveObjective
from model import LayerSpec, MicroBatch, build_layers
from parallel.grid import Grid
from parallel.tensor import LOSSES, Softening, top_class


@dataclass(frozen=True, kw_only=True)
class Supervised(AdditiveObjective):
    """The mean over images of softmax or sigmoid cross entropy (`train.loss`).

    Attributes:
        loss: its name. smoothing: of labels in training. classes: how many. global_batch_size: images per step. layers:
            of one ViT.
    """

    counted = ("loss", "right", "images")

    loss: str
    smoothing: float
    classes: int
    global_batch_size: int
    layers: tuple[LayerSpec, ...]

    @classmethod
    def of(cls, config: Config) -> Self:
        """As Objective."""
        return cls(
            loss=config.train.loss,
            smoothing=config.train.label_smoothing,
            classes=config.model.sizes.classes,
            global_batch_size=config.train.global_batch_size,
            layers=tuple(build_layers(config.model)),
        )

    def loss_share(self, outputs: tuple[Tensor, ...], batch: MicroBatch, grid: Grid, scale: float) -> Tensor:
        """As Objective; in equal parts on the context ranks, which all compute it."""
        return self.losses(outputs, batch, grid).sum() * (scale / (self.global_batch_size * grid.context.size))

    def counts(self, outputs: tuple[Tensor, ...], batch: MicroBatch, grid: Grid) -> Tensor:
        """As AdditiveObjective."""
        right = self.right(outputs[0], batch, grid)
        return torch.stack([self.losses(outputs, batch, grid).sum(), right, batch.weights.sum()]).double()

    def figures(self, totals: Sequence[float]) -> dict[str, float]:
        """As AdditiveObjective: the mean loss and accuracy."""
        loss, right, images = totals
        return {"loss": loss / images, "accuracy": right / images, "images": int(images)}

    def losses(self, outputs: tuple[Tensor, ...], batch: MicroBatch, grid: Grid) -> Tensor:
        """Loss of each image, 0 for padding: [B]."""
        soft = Softening(batch.other_labels, batch.own_shares, self.smoothing if batch.training else 0.0)
        return LOSSES[self.loss](outputs[0], batch.labels, self.classes, grid.tensor, soft) * batch.weights

    def right(self, logits: Tensor, batch: MicroBatch, grid: Grid) -> Tensor:
        """How many images these logits classify right: []."""
        return ((top_class(logits, self.classes, grid.tensor) == batch.labels) * batch.weights).sum()
