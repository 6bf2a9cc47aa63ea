"""Held-out images by their numbers, for who looks at the same few again and again.

Shapes: N images, B in a micro-batch, V views of each, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, batch_of
from data.config import DataConfig
from data.datasets import Dataset
from data.mending import Mender
from data.normalise import Normalise
from data.reading import Content


def spread(count: int, of: int) -> list[int]:
    """Numbers of `count` images of a set of so many, at even distances: sets may be in order of their classes."""
    return [place * of // count for place in range(count)]


def chosen_batches(
    dataset: Dataset,
    indices: Sequence[int],
    *,
    config: DataConfig,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    with_images: bool = True,
    with_texts: bool = True,
) -> list[Batch]:
    """Each as EvalStream gives it, dealt and padded likewise, but ids are places in `indices`; a bad image
    is black."""
    mender = Mender(dataset, config, with_images=with_images, with_texts=with_texts, decides=with_images or with_texts)
    found = []
    for n in range(-(-len(indices) // (micro_batch_size * data_size))):
        first = (n * data_size + data_rank) * micro_batch_size
        own = np.array(indices[first : first + micro_batch_size], dtype=np.int64)
        missing = micro_batch_size - len(own)
        parts = [mender.held_out(own[i : i + 1], 0) for i in range(len(own))]  # what is drawn goes by the first index
        parts += [mender.held_out(own[:0], missing)] if missing else []
        ids = torch.arange(first, first + len(own))
        found.append(batch_of(dataset, _joined(parts, config.all_views), own, ids, missing, config.all_views))
    return found


def pixels_of(dataset: Dataset, indices: Sequence[int], config: DataConfig) -> Tensor:
    """The first views of the same images [N, C, H, W] in 0..1."""
    (batch,) = chosen_batches(
        dataset, indices, config=config, micro_batch_size=len(indices), data_rank=0, data_size=1, with_texts=False
    )
    assert batch.images is not None
    normalise = Normalise(config, channels=dataset.image_shape[0])
    return normalise.undo(batch.images[: len(indices)]).clamp(0, 1)


def _joined(parts: Sequence[Content], views: int) -> Content:
    """Rows of parts [V B', ...], view by view in each -> view by view in all."""

    def joined(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (views, -1)) for part in rows], 1).flatten(0, 1)

    images = [part.images for part in parts if part.images is not None]
    texts = [torch.from_numpy(part.texts) for part in parts if part.texts is not None]
    return Content(joined(images) if images else None, joined(texts).numpy() if texts else None)
