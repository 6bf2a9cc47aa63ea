"""Texts by themselves, as batches for a text tower: prompts of classes, captions of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Batch, DataConfig, Dataset, EvalStream, prompts
from data.captions import Look
from engine.assembly import Assembly
from engine.errors import ConfigError

_AT_ONCE = 1024


@dataclass(frozen=True)
class TextStream:
    """Every text once over all data ranks, dealt as data.EvalStream deals images; the last batch is filled up with the
    last text.

    Attributes:
        tokens: of all texts, int64 [M, S]. assembly: of the text tower.
    """

    tokens: Tensor
    assembly: Assembly

    def __iter__(self) -> Iterator[Batch]:
        a, count = self.assembly, len(self.tokens)
        size, data = a.config.train.micro_batch_size, a.grid.data
        assert size is not None
        for first in range(data.index * size, -(-count // (size * data.size)) * size * data.size, size * data.size):
            numbers = torch.arange(first, first + size)
            is_there = numbers < count
            yield Batch(
                images=None,
                labels=torch.zeros(size, dtype=torch.int64),
                sample_ids=torch.where(is_there, numbers, -1),
                weights=is_there.float(),
                texts=self.tokens[numbers.clamp(max=count - 1)] if a.holds_texts else None,
            )


def prompts_of(dataset: Dataset) -> list[list[str]]:
    """Of each class, as many of each. Raises ConfigError where classes have no names."""
    try:
        found = prompts(dataset)
    except ValueError as error:
        raise ConfigError(f"--task zero_shot: {error}") from error
    assert len({len(of_class) for of_class in found}) == 1, "classes with different numbers of prompts"
    return found


def tokens_of(said: Sequence[str], dataset: Dataset) -> Tensor:
    """Texts in the tokens that the captions of a data set have: int64 [M, S]."""
    assert dataset.texts is not None
    return dataset.texts.encode(said)


@dataclass(frozen=True)
class Captions:
    """What is said of the images of a set, on every rank.

    Attributes:
        tokens: of M texts, int64 [M, S]. image_of: the image of each, int64 [M]. numbers: of the texts, the same where
            they are the same, int64 [M].
    """

    tokens: Tensor
    image_of: Tensor
    numbers: Tensor

    @staticmethod
    def of(dataset: Dataset, config: DataConfig) -> Captions:
        """All that has been written about each image, or else the one caption that says most of how it looks.

        Raises:
            ConfigError: nothing is said of them.
        """
        if dataset.captions is None:
            raise ConfigError("--task retrieval needs captions, and nothing is said of these images: give other data")
        every = [dataset.captions.every(i, label, Look()) for i, label in enumerate(dataset.labels.tolist())]
        counts = torch.tensor([len(texts) for texts in every])
        if bool((counts == 1).all()):  # held-out images may be varied, and what is said of them with them
            stream = EvalStream(
                dataset, config=config, micro_batch_size=_AT_ONCE, data_rank=0, data_size=1, with_images=False
            )
            tokens = torch.cat([batch.texts for batch in stream if batch.texts is not None])[: len(every)]
        else:
            tokens = tokens_of([text for texts in every for text in texts], dataset)
        image_of = torch.arange(len(every)).repeat_interleave(counts)
        return Captions(tokens, image_of, torch.unique(tokens, dim=0, return_inverse=True)[1])
