"""Linear probe by SGD: many linear classifiers at once, one for each learning rate and weight decay.

As DINOv2's linear evaluation trains them (Oquab et al. 2023): momentum 0.9, cosine to 0, learning rates times batch
size / 256, and the best of all counts; here it is the best on held-out training images, and is trained again on all of
them before it is asked about the test images. Features are computed once and images are not augmented, so many
epochs cost seconds.

Classifiers are dealt to ranks, and each rank trains its own on whole batches, whose features the ranks that hold them
give to all: no gradient travels, and a classifier gets the same numbers on any number of ranks. All of a rank's are one
matrix, so a step is two matrix products. They begin at 0: the loss is convex.

Legend: N samples, B of a batch, D features, C classes, H classifiers, of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from data.sampling import SampleOrder
from engine.evaluation.logistic import Judged, judged
from engine.evaluation.probe import Sets
from engine.evaluation.rows import Indices, Rows
from parallel import comm
from parallel.layout import split_range

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 0.5, 1.0, 5.0, 10.0)
"""DINOv2's, and larger ones, for features that are small or few."""
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
EPOCHS, FEWEST_STEPS, BATCH = 10.0, 1000, 1024
_MOMENTUM = 0.9
_AHEAD = 8  # batches whose features are gathered at once


@dataclass(frozen=True)
class Setting:
    """Of one classifier. lr: at a batch of 256, as DINOv2 has it."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Swept:
    """Accuracy on the test images of the best setting; what each does on held-out images; steps of a training."""

    accuracy: float
    best: Setting
    tried: Sequence[tuple[Setting, Judged]]
    steps: int


def sweep(
    sets: Sets, *, learning_rates: Sequence[float] = LEARNING_RATES, weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: float = EPOCHS, fewest_steps: int = FEWEST_STEPS, batch: int = BATCH, seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Swept:  # fmt: skip
    """Train one classifier for each pair, then the best one on all training images. Collective.

    Args:
        epochs: passes over the training images, but no fewer than `fewest_steps` steps. batch: images of a step, of
            all ranks; all of them where there are fewer. seed: of their order.
    """
    settings = [Setting(*pair) for pair in product(learning_rates, weight_decays)]
    mask = sets.chosen_by.numpy()
    fitted = np.flatnonzero(~mask)
    own = range(*split_range(len(settings), sets.train.axis.size, sets.train.axis.index))
    plan = _Plan.of(fitted, sets, epochs, fewest_steps, batch, seed)
    trained = _train([settings[i] for i in own], plan, sets.classes)
    found = _of_all(trained, own, sets.train, sets.train_labels, len(settings), sets.held_out)
    best = max(range(len(settings)), key=lambda i: found[i].merit)
    most = f"held out at most {found[best].accuracy:.2%}"
    tell(f"  {len(settings)} classifiers, {plan.steps} steps of {plan.batch}: {most}")
    own = range(1) if sets.train.axis.index == 0 else range(0)
    everything = _Plan.of(np.arange(sets.train.total), sets, epochs, fewest_steps, batch, seed)
    trained = _train([settings[best]][own.start : own.stop], everything, sets.classes)
    (last,) = _of_all(trained, own, sets.test, sets.test_labels, 1, np.arange(sets.test.total))
    return Swept(last.accuracy, settings[best], list(zip(settings, found, strict=True)), everything.steps)


@dataclass(frozen=True)
class _Plan:
    """Which samples each step sees."""

    samples: Indices
    rows: Rows
    labels: Tensor
    batch: int
    steps: int
    seed: int

    @staticmethod
    def of(samples: Indices, sets: Sets, epochs: float, fewest: int, batch: int, seed: int) -> _Plan:
        batch = min(batch, len(samples))
        steps = max(fewest, round(epochs * len(samples) / batch))
        return _Plan(samples, sets.train, sets.train_labels, batch, steps, seed)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [B, D], labels [B]) of each step. Collective."""
        order = SampleOrder(len(self.samples), self.seed)
        for start in range(0, self.steps, _AHEAD):
            draws = np.arange(start * self.batch, min(start + _AHEAD, self.steps) * self.batch)
            indices = self.samples[order.indices(draws)]
            features = self.rows.gather(indices)
            labels = self.labels[torch.from_numpy(indices)].to(features.device)
            yield from zip(features.split(self.batch), labels.split(self.batch), strict=True)


def _train(settings: Sequence[Setting], plan: _Plan, classes: int) -> Tensor:
    """The classifiers of this rank, weights above their biases: fp32 [D + 1, H, C]. Collective."""
    device, width, heads = plan.rows.values.device, plan.rows.width, len(settings)
    matrix = torch.zeros(width + 1, heads * classes, device=device)
    moved = torch.zeros_like(matrix)
    rates = torch.tensor([s.lr * plan.batch / 256 for s in settings], device=device).repeat_interleave(classes)
    decays = torch.tensor([s.weight_decay for s in settings], device=device).repeat_interleave(classes)
    for step, (x, labels) in enumerate(plan.batches()):
        if not heads:
            continue
        logits = torch.addmm(matrix[-1], x, matrix[:-1]).view(len(x), heads, classes)
        gradient = logits.softmax(2)
        gradient[torch.arange(len(x), device=device), :, labels] -= 1
        flat = gradient.view(len(x), -1).div_(len(x))
        moved.mul_(_MOMENTUM).addcmul_(matrix, decays)
        moved[:-1].addmm_(x.T, flat)
        moved[-1] += flat.sum(0)
        matrix.addcmul_(moved, rates * (0.5 * (1 + np.cos(np.pi * step / plan.steps))), value=-1)
    return matrix.view(width + 1, heads, classes)


def _of_all(trained: Tensor, own: range, rows: Rows, labels: Tensor, count: int, asked: Indices) -> list[Judged]:
    """What each of `count` classifiers does on some samples; this rank has trained those of `own`. Collective.

    The samples travel around the ranks, and each asks its own classifiers; such as have diverged are right about none.
    """
    total = torch.zeros(count, 2, dtype=torch.float64, device=rows.values.device)
    wanted = np.zeros(rows.total, dtype=bool)
    wanted[asked] = True
    for span, values in rows.around():
        here = torch.from_numpy(np.flatnonzero(wanted[span.start : span.stop]))
        for places in here.split(1024) if len(here) and len(own) else ():
            x = values[places.to(values.device)]
            truth = labels[places + span.start].to(values.device)
            logits = torch.einsum("bd,dhc->hbc", x, trained[:-1]) + trained[-1][:, None]
            total[own.start : own.stop] += torch.stack([judged(of_one, truth) for of_one in logits])
    found = [Judged(*pair) for pair in (comm.all_reduce(total, rows.axis) / len(asked)).tolist()]
    return [one if math.isfinite(one.loss) else Judged(0.0, math.inf) for one in found]
