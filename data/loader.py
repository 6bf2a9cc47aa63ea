"""Micro-batches for one data-parallel rank, the same images and pixels in every layout.

Shapes: B images per micro-batch, C channels, H x W pixels. G is the global batch size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.augment import augment, draw_augmentation
from data.config import DataConfig
from data.datasets import Dataset
from data.sampling import SampleOrder


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    images: Tensor | None  # [B, C, H, W] float32, normalised; None where they are not needed
    labels: Tensor  # [B] int64
    sample_ids: Tensor  # [B] int64: the draw in training, the index in evaluation, -1 for padding
    weights: Tensor  # [B] float32: 1 for an image, 0 for padding


class TrainStream:
    """The endless training stream, as one data-parallel rank sees it.

    A global batch is G consecutive draws (see data.sampling). They are dealt to the data ranks in contiguous pieces,
    and these are cut into micro-batches. An image's pixels depend on (seed, draw) alone. With `with_images=False`
    nothing is decoded, for the pipeline stages that need only labels and ids.

    Raises:
        ValueError: if the global batch cannot be cut so, or the normalisation does not suit the number of channels.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        config: DataConfig,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        seed: int,
        with_images: bool = True,
    ) -> None:
        assert 0 <= data_rank < data_size
        _check_batch_sizes(global_batch_size, micro_batch_size, data_size)
        if seed < 0:
            raise ValueError(f"the seed is {seed}: it must be 0 or more")
        self._dataset = dataset
        self._config = config
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank_batch_size = global_batch_size // data_size
        self._data_rank = data_rank
        self._seed = seed
        self._with_images = with_images
        self._order = SampleOrder(len(dataset), seed)
        self._normalise = Normalise(config, channels=dataset.image_shape[0])

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of step `start`, of the step after it, and so on without end."""
        micro_batches = _fetch(self._micro_batch, self._first_draws(start), self._config, self._with_images)
        count = self._rank_batch_size // self._micro_batch_size
        while True:
            yield list(itertools.islice(micro_batches, count))

    def _first_draws(self, start: int) -> Iterator[int]:
        """The first draw of each of this rank's micro-batches."""
        for step in itertools.count(start):
            first = step * self._global_batch_size + self._data_rank * self._rank_batch_size
            yield from range(first, first + self._rank_batch_size, self._micro_batch_size)

    def _micro_batch(self, first_draw: int) -> Batch:
        draws = np.arange(first_draw, first_draw + self._micro_batch_size)
        indices = self._order.indices(draws)
        return Batch(
            images=self._images(first_draw, indices) if self._with_images else None,
            labels=torch.from_numpy(self._dataset.labels[indices]),
            sample_ids=torch.from_numpy(draws),
            weights=torch.ones(len(draws), dtype=torch.float32),
        )

    def _images(self, first_draw: int, indices: NDArray[np.int64]) -> Tensor:
        dataset, config = self._dataset, self._config
        augmentation = draw_augmentation(config, self._seed, first_draw, len(indices))
        crop_when_read = config.crops and dataset.crops_when_read
        images = dataset.read(indices, augmentation.crop if crop_when_read else None)
        return self._normalise(augment(images, augmentation, config, crop=config.crops and not crop_when_read))


class EvalStream:
    """Every image exactly once over all data ranks, unaugmented, for each pass over the stream.

    All ranks see the same number of batches of the same size; what is missing at the end is padded with black images of
    weight 0, label 0 and id -1.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        config: DataConfig,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        with_images: bool = True,
    ) -> None:
        assert 0 <= data_rank < data_size
        self._dataset = dataset
        self._config = config
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._with_images = with_images
        self._normalise = Normalise(config, channels=dataset.image_shape[0])

    def __len__(self) -> int:
        """Batches per data rank."""
        return -(-len(self._dataset) // (self._micro_batch_size * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        first = self._data_rank * self._micro_batch_size
        stride = self._data_size * self._micro_batch_size
        first_indices = range(first, first + len(self) * stride, stride)
        return _fetch(self._micro_batch, first_indices, self._config, self._with_images)

    def _micro_batch(self, first_index: int) -> Batch:
        indices = np.arange(first_index, min(first_index + self._micro_batch_size, len(self._dataset)))
        missing = self._micro_batch_size - len(indices)
        images = None
        if self._with_images:
            images = self._normalise(F.pad(self._dataset.read(indices), (0, 0, 0, 0, 0, 0, 0, missing)))
        return Batch(
            images=images,
            labels=F.pad(torch.from_numpy(self._dataset.labels[indices]), (0, missing)),
            sample_ids=F.pad(torch.from_numpy(indices), (0, missing), value=-1),
            weights=F.pad(torch.ones(len(indices), dtype=torch.float32), (0, missing)),
        )


class Normalise:
    """(pixels - mean) / std, with one number for all channels or one per channel."""

    def __init__(self, config: DataConfig, channels: int) -> None:
        for name, values in (("mean", config.mean), ("std", config.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"data.{name} has {len(values)} numbers, but images have {channels} channels: "
                    f"give one number, or {channels}"
                )
        self._mean = torch.tensor(config.mean, dtype=torch.float32).reshape(-1, 1, 1)
        self._std = torch.tensor(config.std, dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std


def _check_batch_sizes(global_batch_size: int, micro_batch_size: int, data_size: int) -> None:
    if global_batch_size < 1 or micro_batch_size < 1:
        raise ValueError(
            f"train.global_batch_size is {global_batch_size} and train.micro_batch_size {micro_batch_size}: "
            f"both must be 1 or more"
        )
    unit = micro_batch_size * data_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"train.global_batch_size is {global_batch_size}, not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x data-parallel size {data_size} = {unit}: nearest that works is {nearest}"
        )


class _MicroBatches(TorchDataset[Batch]):
    """A map-style data set whose items are whole micro-batches, by their first draw or index."""

    def __init__(self, read: Callable[[int], Batch]) -> None:
        self._read = read

    def __getitem__(self, first: int) -> Batch:
        return self._read(first)


def _fetch(read: Callable[[int], Batch], keys: Iterable[int], config: DataConfig, with_images: bool) -> Iterator[Batch]:
    """read(key) for each key, in their order; ahead of time in worker processes where there is something to decode."""
    if config.workers == 0 or not with_images:
        return map(read, keys)
    return iter(
        DataLoader(
            _MicroBatches(read),
            batch_size=None,  # items are batches already
            sampler=keys,
            num_workers=config.workers,
            generator=torch.Generator(),  # its own, so that workers leave the global random state alone
        )
    )
