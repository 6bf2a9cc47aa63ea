"""What evaluation says of pairs: the loss of all of the held-out set at once, who finds his partner, and which class
an image's nearest prompt names.

Embeddings are collected on the ranks that hold the last layer, n pairs on each data rank; then every one of them
looks for its own pairs' partners among those of all ranks, a block at a time. Products are of fp64, so that a tie is a
tie whatever the blocks are.

Legend: N pairs of all data ranks, n of one, E width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.objectives.base import Evaluation, Outputs
from model import MicroBatch
from parallel import comm
from parallel.comm import Axis
from parallel.contrastive import Gradients
from parallel.grid import Grid

PROMPT = -2
"""The sample id of a row whose text is a prompt of the class that its label says, and whose image is blank."""
_ROWS = 1024
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
        left, right, self._scale, self._bias = outputs
        count = len(left)
        labels, ids = batch.labels[:count], batch.sample_ids[:count]
        same = labels if self._by_label else ids if batch.texts is None else text_numbers(batch.texts)
        real, prompts = batch.weights[:count] > 0, ids == PROMPT
        self._pairs.append(tuple(x[real] for x in (left, right, labels, same)))
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
        left, right, labels, same = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
        loss = self._loss(left, right, self._scale, self._bias, labels, axis).loss.double()
        lefts, rights, sames = (everywhere(x, axis) for x in (left, right, same))
        hits = [finds(left, rights, same, sames), finds(right, lefts, same, sames), self._named(left, labels)]
        loss, *hits = comm.all_reduce(torch.stack([loss, *(hit.double() for hit in hits)]), axis)
        total = torch.full_like(loss, len(lefts))
        return torch.stack([loss, self._scale.double(), hits[0] / total, hits[1] / total, total, hits[2] / total])

    def _named(self, left: Tensor, labels: Tensor) -> Tensor:
        """How many images of this rank are nearest to the prompts of their class; below 0 where there are none.

        A class stands for the mean of its prompts' embeddings (Radford et al. 2021); of equally near ones the first is
        taken.
        """
        axis = self._grid.data
        texts, classes = (torch.cat(parts) for parts in zip(*self._prompts, strict=True))
        most = classes.new_tensor([int(classes.max()) + 1 if len(classes) else 0])
        count = int(comm.all_reduce(most, axis, "max"))
        if not count:
            return left.new_tensor(-1.0)
        sums = torch.zeros(count, texts.shape[1], dtype=torch.float64, device=texts.device)
        sums = comm.all_reduce(sums.index_add_(0, classes, texts.double()), axis)
        means = torch.nn.functional.normalize(sums, dim=1)
        return finds(left, means, labels, torch.arange(count, device=left.device))


def finds(rows: Tensor, others: Tensor, same: Tensor, sames: Tensor) -> Tensor:
    """How many rows [n, E] have a partner as the nearest of all others [N, E]: one with the same number.

    Args:
        same, sames: the numbers of both, int64 [n] and [N].
    """
    wide, count = others.double(), torch.zeros((), dtype=torch.int64, device=rows.device)
    for part, number in zip(rows.split(_ROWS), same.split(_ROWS), strict=True):
        count += (sames[(part.double() @ wide.T).argmax(1)] == number).sum()
    return count


def everywhere(x: Tensor, axis: Axis) -> Tensor:
    """The rows of all ranks, in their order, however many each has: [n, ...] -> [N, ...]. Collective."""
    if axis.size == 1:
        return x
    counts = comm.all_gather_rows(torch.tensor([len(x)], device=x.device), axis).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = comm.all_gather_rows(padded, axis).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def text_numbers(texts: Tensor) -> Tensor:
    """The same number for texts of the same tokens, and hardly for others: [n, S] -> int64 [n]."""
    powers = torch.full((texts.shape[1],), _BASE, dtype=torch.int64, device=texts.device).cumprod(0)
    return ((texts + 1) * powers).sum(1)
