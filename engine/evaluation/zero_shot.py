"""Zero-shot classification: images go to the class whose texts they are nearest to, by cosine.

A class is described by several prompts, and stands for the mean of them: each embedding is brought to length 1, then
they are averaged, and the mean is brought to length 1 (Radford et al. 2021, "Learning transferable visual models",
3.1.4). Of equally near classes the first is taken; products are of fp64, rounded to fp32 (see `nearest.py`).

Legend: N images, C classes, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation.nearest import QUERIES
from engine.evaluation.rows import Rows
from parallel import comm
from parallel.comm import Axis


@dataclass(frozen=True)
class ZeroShot:
    """Shares of the images whose class is the nearest, or among the five nearest; mean over classes of the former."""

    accuracy: float
    top5: float
    mean_per_class: float


def class_embeddings(texts: Tensor, of: Tensor, classes: int, axis: Axis) -> Tensor:
    """One of length 1 for each class, fp64 [C, E], on every rank. Collective.

    Args:
        texts: embeddings of some prompts, [m, E]: all ranks together have each prompt once. of: their classes, [m].
    """
    sums = torch.zeros(classes, texts.shape[1], dtype=torch.float64, device=texts.device)
    return F.normalize(comm.all_reduce(sums.index_add_(0, of, F.normalize(texts.double(), dim=1)), axis), dim=1)


def zero_shot(images: Rows, labels: Tensor, texts: Tensor) -> ZeroShot:
    """Collective.

    Args:
        images: embeddings, of any length. labels: of all images, int64 [N]. texts: of the classes, [C, E], each of
            length 1, on every rank.
    """
    device, classes = images.values.device, len(texts)
    own = labels[images.span.start : images.span.stop].to(device)
    right = torch.zeros(2, classes, dtype=torch.float64, device=device)  # of each class: nearest, among five
    for rows, truth in zip(images.normalised().values.split(QUERIES), own.split(QUERIES), strict=True):
        similarities = (rows.double() @ texts.T).float()
        target = similarities.gather(1, truth[:, None])
        first = torch.arange(classes, device=device) < truth[:, None]
        before = ((similarities > target) | ((similarities == target) & first)).sum(1)
        for row, within in enumerate((1, 5)):
            right[row].index_add_(0, truth, (before < within).double())
    counts = torch.bincount(labels, minlength=classes).double()
    right = comm.all_reduce(right, images.axis).cpu()
    there = counts > 0
    accuracy, top5 = (right.sum(1) / images.total).tolist()
    return ZeroShot(accuracy, top5, float((right[0][there] / counts[there]).mean()))
