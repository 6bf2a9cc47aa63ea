"""What evaluation says of pairs: the loss of all of the held-out set at once, who finds his partner, and which class
an image's nearest prompt names.

Embeddings are collected on the ranks that hold the last layer, and shared out over data ranks in the order of the
samples; what is made of them there is made by engine.evaluation, as it is of a checkpoint's towers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.evaluation.retrieval import recall
from engine.evaluation.rows import Rows
from engine.evaluation.zero_shot import class_embeddings, zero_shot
from engine.objectives.base import Evaluation, Outputs
from model import MicroBatch
from parallel import comm
from parallel.comm import Axis
from parallel.contrastive import Gradients
from parallel.grid import Grid

PROMPT = -2
"""The sample id of a row whose text is a prompt of the class that its label says, and whose image is blank."""
_BASE = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Axis], Gradients]
"""Of left and right rows, scale, bias and labels of this rank, and the axis of the ranks."""


class Alike(Evaluation):
    """Of a contrastive objective.

    Args:
        loss: of pairs. grid, device: of this rank. by_label: whether all of one class belong together. sides: what the
            two sides of a pair are called.
    """

    def __init__(
        self, loss: PairLoss, grid: Grid, device: torch.device, *, by_label: bool, sides: tuple[str, str]
    ) -> None:
        self._loss, self._grid, self._device, self._by_label = loss, grid, device, by_label
        one, other = sides
        self._recalls = f"recall_{one}_to_{other}@1", f"recall_{other}_to_{one}@1"
        self._pairs: list[tuple[Tensor, ...]] = []
        self._prompts: list[tuple[Tensor, Tensor]] = []

    def look(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """As Evaluation."""
        left, right, self._scale, self._bias, *_ = outputs
        count = len(left)
        labels, ids = batch.labels[:count], batch.sample_ids[:count]
        same = labels if self._by_label else ids if batch.texts is None else text_numbers(batch.texts)
        real, prompts = batch.weights[:count] > 0, ids == PROMPT
        about = torch.stack([ids, labels, same], 1)
        self._pairs.append(tuple(x[real] for x in (left, right, about)))
        self._prompts.append((right[prompts], labels[prompts]))
        return self._scale

    def add(self, found: Sequence[Tensor]) -> None:
        """As Evaluation: it was noted."""

    def figures(self, *, holds_loss: bool) -> dict[str, float]:
        """As Evaluation: loss, scale, recall both ways, images, and the accuracy of prompts, where there are any."""
        names = ["loss", "logit_scale", *self._recalls, "images", "zero_shot_accuracy"]
        values = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        if holds_loss:
            found = self._found()
            if not (self._grid.data.index or self._grid.tensor.index or self._grid.context.index):
                values.copy_(found)
        told = dict(zip(names, comm.all_reduce(values, self._grid.world).tolist(), strict=True))
        if told["zero_shot_accuracy"] < 0:
            del told["zero_shot_accuracy"]
        return told | {"images": int(told["images"])}

    def _found(self) -> Tensor:
        """The figures in their order, fp64, the same on all data ranks."""
        axis = self._grid.data
        left, right, about = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
        lefts, rights, abouts = (Rows.dealt(x, about[:, 0], axis) for x in (left, right, about))
        ids, labels, same = abouts.gather(np.arange(abouts.total)).unbind(1)
        own = (labels if self._by_label else ids)[lefts.span.start : lefts.span.stop]
        loss = self._loss(lefts.values, rights.values, self._scale, self._bias, own, axis).loss
        loss = comm.all_reduce(loss.double(), axis)
        found = [recall(a, b, lambda i, j: same[i] == same[j], (1,))[1] for a, b in ((lefts, rights), (rights, lefts))]
        return loss.new_tensor([loss, self._scale, *found, lefts.total, self._named(lefts, labels)])

    def _named(self, images: Rows, labels: Tensor) -> float:
        """The share of the images that are nearest to the prompts of their class; below 0 where there are none."""
        axis = self._grid.data
        texts, of = (torch.cat(parts) for parts in zip(*self._prompts, strict=True))
        most = of.new_tensor([int(of.max()) + 1 if len(of) else 0])
        if not (classes := int(comm.all_reduce(most, axis, "max"))):
            return -1.0
        return zero_shot(images, labels.cpu(), class_embeddings(texts, of, classes, axis)).accuracy


def text_numbers(texts: Tensor) -> Tensor:
    """The same number for texts of the same tokens, and hardly for others: [n, S] -> int64 [n]."""
    powers = torch.full((texts.shape[1],), _BASE, dtype=torch.int64, device=texts.device).cumprod(0)
    return ((texts + 1) * powers).sum(1)
