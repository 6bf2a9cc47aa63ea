"""Linear probe by L-BFGS: how well a linear classifier does on frozen features, as CLIP measured it.

The strength of the regularisation is chosen on a part of the training images that is held out of the fit (one in
five of each class); then the classifier is fitted to all of them, and asked about the test images once. The strengths
lie on a logarithmic grid over twelve decades: every second decade at first, then ever closer around the best, down to
an eighth of a decade (Radford et al. 2021, "Learning transferable visual models", A.3).

`sgd.py` is the other way to the same question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluation.logistic import Samples, fit
from engine.evaluation.rows import Indices, Rows
from parallel import comm

STRENGTHS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Decimal logarithms of the l2 that are tried first."""
FINEST = 0.125
"""Decades between those that are tried last."""


@dataclass(frozen=True)
class Sets:
    """What a probe is fitted to and asked about.

    Attributes:
        train, test: features. train_labels, test_labels: of the whole sets, int64 [N], on every rank.
        held_out: samples of the training set that hyper-parameters are chosen by.
    """

    train: Rows
    train_labels: Tensor
    test: Rows
    test_labels: Tensor
    held_out: Indices
    classes: int

    @property
    def chosen_by(self) -> Tensor:
        """Whether each training sample is held out: bool [N]."""
        mask = torch.zeros(self.train.total, dtype=torch.bool)
        mask[torch.from_numpy(self.held_out)] = True
        return mask

    def standardised(self) -> Sets:
        """The same with each feature's mean over the training images taken off, and divided by its deviation.
        Collective.
        """
        mean, scale = moments(self.train)
        train, test = (rows.replace((rows.values - mean) / scale) for rows in (self.train, self.test))
        return Sets(train, self.train_labels, test, self.test_labels, self.held_out, self.classes)


def moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation; 1 where that is 0) of each feature over all ranks, fp32 [D]. Collective.

    In two passes, since features may be far from 0 and close to each other.
    """
    mean = comm.all_reduce(rows.values.sum(0, dtype=torch.float64), rows.axis) / rows.total
    squares = torch.zeros_like(mean)
    for block in rows.values.split(4096):
        squares += (block - mean).square().sum(0)
    deviation = (comm.all_reduce(squares, rows.axis) / rows.total).sqrt()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0).float()


@dataclass(frozen=True)
class Tried:
    """A strength, what its fit does on held-out images, and whether that had converged."""

    l2: float
    held_out_accuracy: float
    held_out_loss: float
    converged: bool
    iterations: int


@dataclass(frozen=True)
class Probe:
    """Accuracy on the test images, of the best strength; all that were tried, ascending. converged: the last fit."""

    accuracy: float
    l2: float
    tried: Sequence[Tried]
    converged: bool


def probe(
    sets: Sets, *, strengths: Sequence[float] = STRENGTHS, finest: float = FINEST, tolerance: float = 1e-6,
    iterations: int = 1000, tell: Callable[[str], None] = lambda line: None,
) -> Probe:  # fmt: skip
    """The sweep, the last fit and its accuracy. Collective.

    Args:
        strengths: decimal logarithms of l2, evenly spaced; one: nothing is swept. finest: spacing at which the search
            around the best ends. tolerance: largest element of the gradient of the mean loss. tell: of each fit.
    """
    sweep = _Sweep(sets, tolerance, iterations, tell)
    for at in sorted(strengths, reverse=True):  # each fit starts from the one before: strong ones are quick
        sweep.try_out(at)
    spacing = abs(strengths[1] - strengths[0]) if len(strengths) > 1 else 0.0
    while spacing > finest and len(strengths) > 1:
        spacing /= 2
        best = sweep.best
        for at in (best + spacing, best - spacing):
            if min(strengths) <= at <= max(strengths):
                sweep.try_out(at)
    best = sweep.best
    everything = Samples.of(sets.train, sets.train_labels)
    classifier, found = fit(
        everything, sets.classes, 10**best, start=sweep.parts[best], tolerance=tolerance, iterations=iterations
    )
    tried = [sweep.tried[at] for at in sorted(sweep.tried)]
    accuracy, _ = classifier.judge(Samples.of(sets.test, sets.test_labels))
    return Probe(accuracy, 10**best, tried, found.converged)


class _Sweep:
    def __init__(self, sets: Sets, tolerance: float, iterations: int, tell: Callable[[str], None]) -> None:
        self.sets, self.tolerance, self.iterations, self.tell = sets, tolerance, iterations, tell
        mask = sets.chosen_by
        self.fitted = Samples.of(sets.train, sets.train_labels, ~mask)
        self.asked = Samples.of(sets.train, sets.train_labels, mask)
        self.tried: dict[float, Tried] = {}
        self.parts: dict[float, Tensor] = {}

    @property
    def best(self) -> float:
        """The logarithm of the best."""
        return max(self.tried, key=lambda at: (self.tried[at].held_out_accuracy, -self.tried[at].held_out_loss))

    def try_out(self, at: float) -> None:
        """Fit with l2 = 10^at, from the minimum of the nearest stronger one."""
        if at in self.tried:
            return
        stronger = [other for other in self.parts if other > at]
        start = self.parts[min(stronger)] if stronger else None
        classifier, found = fit(
            self.fitted, self.sets.classes, 10**at, start=start, tolerance=self.tolerance, iterations=self.iterations
        )
        accuracy, loss = classifier.judge(self.asked)
        self.parts[at] = found.point
        self.tried[at] = Tried(10**at, accuracy, loss, found.converged, found.iterations)
        end = "" if found.converged else f", not converged (gradient {found.gradient_max:.1e})"
        self.tell(f"  l2 {10**at:.3e}: held out {accuracy:.2%}, loss {loss:.4f}, {found.iterations} iterations{end}")
