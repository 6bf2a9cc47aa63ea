"""What a micro-batch is of: images and texts with their labels, ids and weights, and what is padding.

Shapes: B images per micro-batch, C channels, H x W pixels, S tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.datasets import Dataset
from data.mending import LEFT_OUT
from data.portions import Cut
from data.reading import Content
from data.resolution import Map

SECOND_VIEW = 2**40
"""Added to the id of a sample, which is far below, for its second view, and as often as that for further ones."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B images; with `data.views` 2, of images and then another view of each, and then one local crop
    of each after the other."""

    images: Tensor | None  # [B, C, H, W] float32, normalised; None where they are not needed
    labels: Tensor  # [B] int64; -1: not known
    sample_ids: Tensor  # [B] int64: the draw in training, the index in evaluation, -1 for padding; views: SECOND_VIEW
    weights: Tensor  # [B] float32: 1 for an image, 0 for padding
    texts: Tensor | None = None  # [B, S] int64: what is said of each image; None where that is not needed
    indices: Tensor | None = None  # [B] int64: the image of each row, by its number in the set, -1 for padding
    other_labels: Tensor | None = None  # [B] int64: of the image that each is mixed with; None: none is
    own_shares: Tensor | None = None  # [B] float32: of the image itself in that
    maps: tuple[Map, ...] | None = None  # rows and columns of patches; images are then these, packed (data.resolution)
    cut: Cut | None = None  # images are then this rank's portion, to be put together with those of others


def batch_of(
    dataset: Dataset, content: Content, indices: NDArray[np.int64], ids: Tensor, missing: int, views: int
) -> Batch:
    """A micro-batch of so many views of the images at `indices`, padded where images are missing or LEFT_OUT."""
    there = torch.from_numpy(indices != LEFT_OUT)
    labels = torch.from_numpy(dataset.labels_of(np.where(indices == LEFT_OUT, 0, indices)))
    all_ids = [F.pad(torch.where(there, ids + view * SECOND_VIEW, -1), (0, missing), value=-1) for view in range(views)]
    return Batch(
        images=content.images,
        labels=F.pad(torch.where(there, labels, 0), (0, missing)).repeat(views),
        sample_ids=torch.cat(all_ids),
        weights=F.pad(there.to(torch.float32), (0, missing)).repeat(views),
        texts=None if content.texts is None else torch.from_numpy(content.texts),
        indices=F.pad(torch.from_numpy(indices), (0, missing), value=-1).repeat(views),
        maps=content.maps,
    )
