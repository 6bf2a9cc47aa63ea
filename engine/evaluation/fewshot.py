"""Few-shot accuracy by regularised least squares, in closed form, as big_vision has it (`evaluators/fewshot_lsr.py`).

So many training images of each class, drawn by a seed as there; features standardised over them; a column of 100 for
the bias, so large that it is hardly regularised; targets 1 for the class and -1 for the others; and the weights
(X'X + l2)^-1 X'Y, or X'(XX' + l2)^-1 Y where there are fewer images than features. One eigendecomposition serves all
l2, in fp64. big_vision's recipes have l2 = 2^10; there is no held-out part to choose by, so each l2 is told of, and
none is chosen.

Problems (a seed and a number of shots) are dealt to ranks; their answers go to all, which ask their own test images.

Legend: M images of a problem, D features, C classes, L strengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation.knn import first_of_most
from engine.evaluation.rows import Indices, Rows
from parallel import comm

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2 = 2.0**10
"""big_vision's."""
GRID = tuple(2.0**power for power in range(-10, 21, 2))
_BIAS, _SMALLEST = 100.0, 1e-5


@dataclass(frozen=True)
class FewShot:
    """accuracies: by (shots, l2), of each seed."""

    accuracies: Mapping[tuple[int, float], Sequence[float]]

    def mean(self, shots: int, l2: float) -> float:
        """Over the seeds."""
        return fmean(self.accuracies[shots, l2])


@dataclass(frozen=True)
class _Answer:
    """What a classifier does: takes `mean` off features, divides by `deviation`, and multiplies by one of `weights`
    [L, D + 1, C], whose last row is the bias."""

    mean: Tensor
    deviation: Tensor
    weights: Tensor

    def packed(self) -> Tensor:
        return torch.cat([self.mean, self.deviation, self.weights.reshape(-1)])

    @staticmethod
    def unpacked(flat: Tensor, width: int, classes: int, strengths: int) -> _Answer:
        mean, deviation, weights = flat.split([width, width, strengths * (width + 1) * classes])
        return _Answer(mean, deviation, weights.view(strengths, width + 1, classes))


def few_shot(
    train: Rows, train_labels: Tensor, test: Rows, test_labels: Tensor, *, classes: int,
    shots: Sequence[int] = SHOTS, seeds: Sequence[int] = SEEDS, strengths: Sequence[float] = GRID,
) -> FewShot:  # fmt: skip
    """The accuracy of each (shots, l2) for each seed. Collective.

    Args:
        train_labels, test_labels: of the whole sets, int64 [N], on every rank. Of a class with fewer images than shots
            all are taken.

    Raises:
        ValueError: a class has no training image.
    """
    axis, device = train.axis, test.values.device
    problems = list(product(seeds, shots))
    own = test_labels[test.span.start : test.span.stop].to(device)
    accuracies: dict[tuple[int, float], list[float]] = {(n, l2): [] for n in shots for l2 in strengths}
    length = 2 * train.width + len(strengths) * (train.width + 1) * classes
    for start in range(0, len(problems), axis.size):
        dealt = problems[start : start + axis.size]
        answer = torch.empty(length, dtype=torch.float64, device=device)
        for rank, (seed, n) in enumerate(dealt):
            indices = drawn(train_labels.numpy(), classes, n, seed)
            features = train.gather(indices)  # on all ranks: each row comes from another
            if rank == axis.index:
                y = train_labels[torch.from_numpy(indices)].to(device)
                answer = _solve(features.double(), y, classes, strengths).packed()
        for rank, (_, n) in enumerate(dealt):
            flat = answer if rank == axis.index else torch.empty_like(answer)
            solved = _Answer.unpacked(comm.broadcast(flat, axis, rank), train.width, classes, len(strengths))
            right = comm.all_reduce(_right(solved, test.values, own), axis) / test.total
            for l2, accuracy in zip(strengths, right.tolist(), strict=True):
                accuracies[n, l2].append(accuracy)
    return FewShot(accuracies)


def drawn(labels: Indices, classes: int, shots: int, seed: int) -> Indices:
    """The images of a problem: of each class the first `shots` of a permutation, the same for every number of shots."""
    generator = np.random.default_rng(seed)
    places = [generator.permutation(np.flatnonzero(labels == label)) for label in range(classes)]
    if missing := [label for label, found in enumerate(places) if not len(found)]:
        raise ValueError(f"there is no training image of class {missing[0]}, and few shots need one of each class")
    return np.concatenate([found[:shots] for found in places])


def _solve(x: Tensor, labels: Tensor, classes: int, strengths: Sequence[float]) -> _Answer:
    """Of a problem's features [M, D], fp64, and labels [M]."""
    mean, deviation = x.mean(0), x.std(0, correction=0) + _SMALLEST
    x = F.pad((x - mean) / deviation, (0, 1), value=_BIAS)
    y = 2.0 * F.one_hot(labels, classes).to(x) - 1.0
    if len(x) >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        values, vectors = torch.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    weights = torch.stack([(left / (values + l2)) @ right for l2 in strengths])
    weights[:, -1] *= _BIAS
    return _Answer(mean, deviation, weights)


def _right(answer: _Answer, test: Tensor, labels: Tensor) -> Tensor:
    """How many of this rank's test images each strength gets right: fp64 [L]."""
    right = torch.zeros(len(answer.weights), dtype=torch.float64, device=test.device)
    for values, truth in zip(test.split(4096), labels.split(4096), strict=True):
        x = (values.double() - answer.mean) / answer.deviation
        for i, weights in enumerate(answer.weights):
            right[i] += (first_of_most(x @ weights[:-1] + weights[-1]) == truth).sum()
    return right
