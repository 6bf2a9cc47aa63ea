"""Retrieval: is the text among the nearest to its image, and the image among the nearest to its text?

An image may have several texts; it is found if one of them is among the K nearest, and each text looks for its one
image (Karpathy and Fei-Fei 2015; CLIP's and big_vision's evaluation on COCO). Texts that are the same belong to all
images that one of them is of, and are looked at as one: nothing could tell them apart.

Legend: N images, M texts, E embedding, K how many of the nearest are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluation.nearest import nearest
from engine.evaluation.rows import Rows
from parallel import comm

WITHIN = (1, 5, 10)


@dataclass(frozen=True)
class Recalls:
    """Shares that find what belongs to them among the K nearest, by K."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieval(
    images: Rows, texts: Rows, image_of_text: Tensor, *, numbers: Tensor | None = None, within: Sequence[int] = WITHIN
) -> Recalls:
    """Recall both ways. Collective.

    Args:
        images, texts: embeddings, of any length. image_of_text: the image of each text, int64 [M], on every rank.
            numbers: of the texts, the same where they are the same, int64 [M], below M; None: all are others.

    Raises:
        ValueError: there are fewer images, or different texts, than the largest of `within`, or an image has no text.
    """
    counts = torch.bincount(image_of_text, minlength=images.total)
    if len(image_of_text) != texts.total or len(counts) != images.total or not bool((counts > 0).all()):
        raise ValueError(
            f"each of the {images.total} images needs a text, and each of the {texts.total} texts one image that is "
            "there"
        )
    device, m = images.values.device, texts.total
    numbers = torch.arange(m) if numbers is None else numbers
    firsts = torch.full((m,), m).scatter_reduce_(0, numbers, torch.arange(m), "amin")[numbers].unique()
    different, numbers = numbers[firsts].to(device), numbers.to(device)
    belong = torch.unique(image_of_text.to(device) * m + numbers)  # each image and text, as one number
    images, texts = images.normalised(), texts.normalised()
    return Recalls(
        image_to_text=recall(
            images, texts.select(firsts.numpy()), lambda i, t: torch.isin(i * m + different[t], belong), within
        ),
        text_to_image=recall(texts, images, lambda t, i: torch.isin(i * m + numbers[t], belong), within),
    )


def recall(
    queries: Rows, bank: Rows, belong: Callable[[Tensor, Tensor], Tensor], within: Sequence[int]
) -> dict[int, float]:
    """Shares of the queries to which one of the K nearest rows of the bank belongs, by K; both of normalised rows.
    Collective.

    Args:
        belong: numbers of queries, int64 [n, 1], and of rows of the bank, [n, K] -> whether they do, bool [n, K].

    Raises:
        ValueError: the bank has fewer rows than the largest K.
    """
    found = nearest(queries, bank, max(within)).indices
    hits = belong(torch.arange(queries.span.start, queries.span.stop, device=found.device)[:, None], found)
    counts = torch.stack([hits[:, :k].any(1).sum() for k in within]).double()
    return dict(zip(within, (comm.all_reduce(counts, queries.axis) / queries.total).tolist(), strict=True))
