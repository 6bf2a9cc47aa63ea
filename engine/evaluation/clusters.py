"""What features tell without a label: k-means puts them into as many clusters as there are classes, and held-out images
go into the nearest.

A cluster has no name; clusters are given those that make most of the training images right, each class's to one of them
(Hungarian matching; Kuhn 1955, as Xie et al. 2016 measure clustering). Labels are read for the names alone. Each start
draws its centres by squared distance (Arthur and Vassilvitskii 2007, "k-means++"), then follows Lloyd until no image
changes its cluster; the start whose images lie nearest to their centres is taken. Sums are of fp64, and
nearness is rounded to fp32, of equally near centres the first: so any number of ranks comes to the same clusters.

Legend: N images, n of this rank, D features, K clusters, as many as classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.evaluation.knn import first_of_most
from engine.evaluation.nearest import QUERIES
from engine.evaluation.rows import Rows
from parallel import comm

STARTS = 20
_MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Start:
    """One run of k-means. spread: mean squared distance of training images from their centres. converged: whether they
    stopped changing clusters.
    """

    spread: float
    converged: bool


@dataclass(frozen=True)
class Clustering:
    """Shares of held-out and of training images whose cluster has their class's name; every start; the best one's
    number; the class of each cluster.
    """

    accuracy: float
    train_accuracy: float
    starts: list[Start]
    best: int
    names: list[int]


def clustering(
    train: Rows, labels: Tensor, test: Rows, test_labels: Tensor, *, classes: int, starts: int = STARTS, seed: int = 0
) -> Clustering:
    """Collective.

    Args:
        train, test: features of any length; they are brought to length 1. labels, test_labels: of all of them, int64
            [N], on every rank. starts: of k-means. seed: of their draws.

    Raises:
        ValueError: there are fewer training images than classes.
    """
    from scipy.optimize import linear_sum_assignment  # half a second, of which no other task has a use

    if train.total < classes:
        raise ValueError(f"{classes} clusters of {train.total} training images: give at least one image for each")
    train, test = train.normalised(), test.normalised()
    found = [_run(train, np.random.default_rng([seed, start]).random(classes)) for start in range(starts)]
    best = min(range(starts), key=lambda i: np.float32(found[i][0].spread))  # the first of those that are alike
    centres = found[best][1]
    counts = _confusion(train, labels, centres)
    clusters, names = linear_sum_assignment(counts.numpy(), maximize=True)
    asked = _confusion(test, test_labels, centres)
    return Clustering(
        accuracy=float(asked[clusters, names].sum() / test.total),
        train_accuracy=float(counts[clusters, names].sum() / train.total),
        starts=[start for start, _ in found],
        best=best,
        names=names.tolist(),
    )


def _run(rows: Rows, draws: NDArray[np.float64]) -> tuple[Start, Tensor]:
    """From one start: what came of it, and the centres, fp64 [K, D]."""
    centres, changed = begin(rows, draws), 1
    before: Tensor | None = None
    for _ in range(_MOST_ROUNDS):
        clusters, sums, members, spread = _round(rows, centres)
        if before is not None:
            changed = int(comm.all_reduce((clusters != before).sum(), rows.axis))
        if not changed:
            break
        before = clusters
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)  # one without images stays
    return Start(spread, not changed), centres


def begin(rows: Rows, draws: NDArray[np.float64]) -> Tensor:
    """First centres: samples, each drawn by its squared distance from the nearest one before it, fp64 [K, D].
    Collective.

    Args:
        draws: a number in [0, 1) for each.
    """
    distances = torch.ones(len(rows.values), dtype=torch.float64, device=rows.values.device)
    centres = []
    for draw in draws.tolist():
        centre = rows.gather(np.array([_drawn(distances, draw, rows)]))[0].double()
        centres.append(centre)
        apart = [(part.double() - centre).square().sum(1) for part in rows.values.split(QUERIES)]
        distances = torch.minimum(distances, torch.cat(apart)) if len(centres) > 1 else torch.cat(apart)
    return torch.stack(centres)


def _drawn(weights: Tensor, draw: float, rows: Rows) -> int:
    """The number of a sample: each is drawn as often as its weight says, [n] on this rank; the last, if all are 0."""
    sums = weights.cumsum(0)
    of_ranks = weights.new_zeros(rows.axis.size)
    of_ranks[rows.axis.index] = weights.sum()
    of_ranks = comm.all_reduce(of_ranks, rows.axis)
    above = (sums + of_ranks[: rows.axis.index].sum() > draw * of_ranks.sum()).nonzero()
    first = rows.span.start + int(above[0]) if len(above) else rows.total - 1
    return int(comm.all_reduce(torch.tensor([first], device=weights.device), rows.axis, "min"))


def nearest_centre(values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(the nearest centre of each row, int64 [r]; half its length squared less half their squared distance, [r]).

    Args:
        values: [r, D]. centres: fp64 [K, D].
    """
    closeness = values.double() @ centres.T - centres.square().sum(1) / 2
    nearest = first_of_most(closeness.float())
    return nearest, closeness.gather(1, nearest[:, None])[:, 0]


def _round(rows: Rows, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of each row the nearest centre, [n]; of each centre the sum of its rows, [K, D], and their number, [K, 1]; and
    the mean of all rows' squared distances."""
    (k, d), found = centres.shape, []
    sums = centres.new_zeros(k, d + 2)
    for part in rows.values.split(QUERIES):
        nearest, closeness = nearest_centre(part, centres)
        wide = part.double()
        distance = wide.square().sum(1) - 2 * closeness
        sums.index_add_(0, nearest, torch.cat([wide, torch.ones_like(wide[:, :1]), distance[:, None]], 1))
        found.append(nearest)
    sums, members, distances = comm.all_reduce(sums, rows.axis).split([d, 1, 1], 1)
    return torch.cat(found), sums, members, float(distances.sum() / rows.total)


def _confusion(rows: Rows, labels: Tensor, centres: Tensor) -> Tensor:
    """How many rows of each cluster are of each class: fp64 [K, K] on the host."""
    k, device = len(centres), rows.values.device
    own, counts = labels[rows.span.start : rows.span.stop].to(device), centres.new_zeros(k, k)
    for part, label in zip(rows.values.split(QUERIES), own.split(QUERIES), strict=True):
        clusters, _ = nearest_centre(part, centres)
        counts.view(-1).index_add_(0, clusters * k + label, torch.ones_like(label, dtype=counts.dtype))
    return comm.all_reduce(counts, rows.axis).cpu()
