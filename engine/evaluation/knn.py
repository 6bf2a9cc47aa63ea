"""Classification by nearest neighbours: the held-out images ask the training images, by cosine.

Two votes over the same neighbours: one each, and DINO's (Caron et al. 2021, "Emerging properties in self-supervised
vision transformers"; Wu et al. 2018), where a neighbour of similarity s counts exp(s / temperature). Of classes with
equal votes the first is taken.

Legend: q queries of this rank, k neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluation.nearest import QUERIES, nearest
from engine.evaluation.rows import Rows
from parallel import comm

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
"""What is asked of unless the user says otherwise; those of the DINO papers, and fewer."""
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Vote:
    """Accuracy with k neighbours: weighted by similarity, and plain."""

    k: int
    weighted: float
    plain: float


def knn(
    queries: Rows, labels: Tensor, bank: Rows, bank_labels: Tensor, *, classes: int, ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> list[Vote]:  # fmt: skip
    """The accuracy of each of `ks`, ascending. Collective.

    Args:
        queries, bank: of any length; cosines are taken. labels, bank_labels: of all queries and of all of the bank,
            int64 [N], on every rank.

    Raises:
        ValueError: some k is larger than the bank.
    """
    ks = sorted(set(ks))
    device = queries.values.device
    found = nearest(queries.normalised(), bank.normalised(), ks[-1])
    labels_of, own = bank_labels.to(device), labels.to(device)[queries.span.start : queries.span.stop]
    right = torch.zeros(len(ks), 2, dtype=torch.float64, device=device)
    for start in range(0, len(own), QUERIES):
        part = slice(start, start + QUERIES)
        similarities = found.similarities[part].double()
        weights = torch.exp((similarities - similarities[:, :1]) / temperature)  # of the nearest 1: none is lost
        right += _right(labels_of[found.indices[part]], weights, own[part], classes, ks)
    shares = (comm.all_reduce(right, queries.axis) / queries.total).tolist()
    return [Vote(k, *share) for k, share in zip(ks, shares, strict=True)]


def _right(neighbours: Tensor, weights: Tensor, labels: Tensor, classes: int, ks: Sequence[int]) -> Tensor:
    """How many of some queries each k gets right, by weighted and by plain votes: [len(ks), 2]."""
    votes = weights.new_zeros(2, len(labels), classes)
    counts, done = [], 0
    for k in ks:
        new = neighbours[:, done:k]
        votes[0].scatter_add_(1, new, weights[:, done:k])
        votes[1].scatter_add_(1, new, torch.ones_like(weights[:, done:k]))
        counts.append((first_of_most(votes) == labels).sum(1))
        done = k
    return torch.stack(counts).double()


def first_of_most(scores: Tensor) -> Tensor:
    """The first of the largest of [..., C] (argmax promises none of them)."""
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == scores.amax(-1, keepdim=True), numbers, scores.shape[-1]).amin(-1)
