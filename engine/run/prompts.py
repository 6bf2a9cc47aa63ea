"""What is true of every image of a class, as batches for the same forward passes as images and their texts.

Prompts are pairs whose image is blank: all that a text tower needs is there, wherever its stages are. Their sample id
says what they are, and their weight 0 that they count for nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from data import Batch, Dataset, prompts
from engine.objectives.alike import PROMPT


def prompt_batches(
    dataset: Dataset,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    with_images: bool,
    with_texts: bool,
    **_: Any,
) -> list[Batch]:
    """Of each class of a data set, on one of so many data ranks: the same number of batches on all of them.

    None, where the set has no texts, or its classes no names. Arguments as of data.EvalStream.
    """
    if dataset.texts is None or dataset.captions is None or dataset.captions.prompts() is None:
        return []
    found = [(text, label) for label, texts in enumerate(prompts(dataset)) for text in texts]
    size = micro_batch_size
    count = -(-len(found) // (size * data_size))
    tokens = dataset.texts.encode([text for text, _ in found])
    labels = torch.tensor([label for _, label in found])
    batches = []
    blank = torch.zeros(1, *dataset.image_shape).expand(size, *dataset.image_shape)  # one for all
    for n in range(count):
        first = (n * data_size + data_rank) * size
        missing = size - max(0, min(size, len(found) - first))
        ids = torch.full((size,), PROMPT)
        ids[size - missing :] = -1
        own = torch.arange(first, first + size).clamp(max=len(found) - 1)
        batches.append(
            Batch(
                images=blank if with_images else None,
                labels=labels[own],
                sample_ids=ids,
                weights=torch.zeros(size),
                texts=tokens[own] if with_texts else None,
            )
        )
    return batches
