"""Multinomial logistic regression on features that are shared out over ranks.

What is minimised is scikit-learn's: the sum over samples of the cross entropy, plus l2 / 2 times the squared norm of
the weights (its C is 1 / l2); the bias is free. It is divided by the number of samples, so that the tolerance means
the same whatever their number. All of it in fp64: along a sweep of l2 over twelve decades fp32 does not converge.
The mean of the features is taken off while it is minimised, which a free bias makes good again: the same classifier,
found in a fraction of the iterations.

Legend: n rows of this rank, D features, C classes, P = (D + 1) C parameters, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.evaluation.knn import first_of_most
from engine.evaluation.lbfgs import Minimum, minimise
from engine.evaluation.rows import Rows
from parallel import comm

_BLOCK_BYTES = 64 * 2**20  # of logits


@dataclass(frozen=True)
class Samples:
    """Some of the samples of a set: this rank's rows of them.

    Attributes:
        values: [n, D]. labels: int64 [n]. total: how many there are on all ranks. like: the rows that they are of.
    """

    values: Tensor
    labels: Tensor
    total: int
    like: Rows

    @staticmethod
    def of(rows: Rows, labels: Tensor, chosen: Tensor | None = None) -> Samples:
        """Those of `rows` that are `chosen` (all).

        Args:
            labels: of the whole set, int64 [N]. chosen: of the whole set, bool [N].
        """
        own, device = slice(rows.span.start, rows.span.stop), rows.values.device
        here = labels[own].to(device)
        if chosen is None:
            return Samples(rows.values, here, rows.total, rows)
        mask = chosen[own].to(device)
        return Samples(rows.values[mask], here[mask], int(chosen.sum()), rows)


class Judged(NamedTuple):
    """What a classifier does on some samples: the share that it gets right, and the mean cross entropy."""

    accuracy: float
    loss: float

    @property
    def merit(self) -> tuple[float, float]:
        """What is larger of the better one: of equally many right, the one with less loss."""
        return self.accuracy, -self.loss


class Classifier:
    """A linear classifier: weights and bias as one matrix [D + 1, C], fp64, on every rank while it is used."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def judge(self, samples: Samples) -> Judged:
        """Collective."""
        total = torch.zeros(2, dtype=torch.float64, device=samples.values.device)
        for x, labels in _blocks(samples, self.matrix.shape[1]):
            total += judged(x @ self.matrix[:-1] + self.matrix[-1], labels)
        right, loss = comm.all_reduce(total, samples.like.axis).tolist()
        return Judged(right / samples.total, loss / samples.total)


def judged(logits: Tensor, labels: Tensor) -> Tensor:
    """How many are right, and the sum of their cross entropies: [B, C] and int64 [B] -> fp64 [2]."""
    loss = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    return torch.stack([(first_of_most(logits) == labels).sum().double(), loss.double().sum()])


class Loss:
    """The function that is minimised, of flat points [P] padded to a multiple of W, of which each rank has a part.

    Collective when it is made.
    """

    def __init__(self, samples: Samples, classes: int, l2: float) -> None:
        self.samples, self.classes, self.l2, self.axis = samples, classes, l2, samples.like.axis
        self.shape = (samples.like.width + 1, classes)
        numel = self.shape[0] * self.shape[1]
        self.part = -(-numel // self.axis.size)
        first = self.axis.index * self.part
        self.mean = comm.all_reduce(samples.values.sum(0, dtype=torch.float64), self.axis) / samples.total
        # of this rank's part, the elements that are weights: the bias is the last row
        self.weights = slice(0, min(self.part, max(0, numel - classes - first)))

    def start(self) -> Tensor:
        """This rank's part of zero, from where a convex function may be gone down as well as from anywhere."""
        return torch.zeros(self.part, dtype=torch.float64, device=self.samples.values.device)

    def classifier(self, part: Tensor) -> Classifier:
        """Of features as they are. Collective."""
        matrix = self._matrix(part).clone()
        matrix[-1] -= self.mean @ matrix[:-1]
        return Classifier(matrix)

    def _matrix(self, part: Tensor) -> Tensor:
        """[D + 1, C] of all ranks' parts, for features without their mean. Collective."""
        whole = comm.all_gather_rows(part, self.axis)
        return whole[: self.shape[0] * self.shape[1]].view(self.shape)

    def __call__(self, part: Tensor) -> tuple[float, Tensor]:
        """As lbfgs.Objective."""
        matrix = self._matrix(part)
        gradient = matrix.new_zeros(self.part * self.axis.size)
        of_matrix = gradient[: matrix.numel()].view(self.shape)
        value = matrix.new_zeros(1)
        for x, labels in _blocks(self.samples, self.classes):
            x -= self.mean
            logits = torch.addmm(matrix[-1], x, matrix[:-1])
            at = torch.arange(len(labels), device=labels.device)
            target = logits[at, labels]
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1)
            value += (total.log() + largest[:, 0] - target).sum()
            probabilities = logits.div_(total[:, None])
            probabilities[at, labels] -= 1
            of_matrix[:-1].addmm_(x.T, probabilities)
            of_matrix[-1] += probabilities.sum(0)
        own = comm.reduce_scatter_rows(gradient, self.axis)
        weights = part[self.weights]
        own[self.weights] += self.l2 * weights
        value += 0.5 * self.l2 * weights.square().sum()
        return comm.all_reduce(value, self.axis).item() / self.samples.total, own / self.samples.total


def _blocks(samples: Samples, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows, in fp64 only while they are looked at, with their labels."""
    rows = max(1, _BLOCK_BYTES // (8 * max(classes, samples.like.width)))
    for values, labels in zip(samples.values.split(rows), samples.labels.split(rows), strict=True):
        if len(labels):
            yield values.to(torch.float64, copy=True), labels


def fit(
    samples: Samples, classes: int, l2: float, *, start: Tensor | None, tolerance: float, iterations: int
) -> tuple[Classifier, Minimum]:
    """The classifier of least loss, and how it was found. Collective.

    Args:
        start: this rank's part of the minimum for another l2.
    """
    loss = Loss(samples, classes, l2)
    found = minimise(
        loss, loss.start() if start is None else start, loss.axis, tolerance=tolerance, iterations=iterations
    )
    return loss.classifier(found.point), found
