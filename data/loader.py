"""Micro-batches for one data-parallel rank, the same images and pixels in every layout.

Shapes: B images per micro-batch, C channels, H x W pixels. G is the global batch size.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from data.errors import UnreadableImageError
from data.sampling import SampleOrder
from data.workers import begin_worker, read_ahead

# What workers hold ready beyond what each is at work on: enough for a schedule that takes micro-batches in bursts.
# Every one is an open file, and memory of the host in which few files may be open and little may be shared.
_READY_BATCHES, _READY_BYTES = 64, 64 * 2**20


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
    nothing is decoded, for the pipeline stages that need only labels and ids. Step s begins with draw s G + `offset`:
    not 0 where the first steps of a run had another G.

    Attributes:
        waited: seconds in all that the caller has waited for micro-batches; without workers, the time to read them.

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
        offset: int = 0,
    ) -> None:
        assert 0 <= data_rank < data_size
        _check_batch_sizes(global_batch_size, micro_batch_size, data_size)
        if seed < 0:
            raise ValueError(f"the seed is {seed}: it must be 0 or more")
        self.waited = 0.0
        self._dataset = dataset
        self._config = config
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank_batch_size = global_batch_size // data_size
        self._data_rank = data_rank
        self._seed = seed
        self._with_images = with_images
        self._offset = offset
        self._order = SampleOrder(len(dataset), seed)
        self._normalise = Normalise(config, channels=dataset.image_shape[0])

    def steps(self, start: int) -> Iterator[StepBatches]:
        """This rank's micro-batches of step `start`, of the step after it, and so on without end.

        They are read while the step goes on, see StepBatches.
        """
        source = self._source(start)
        for step in itertools.count(start):
            first = self._first_draw(step)
            yield StepBatches(self, source, range(first, first + self._rank_batch_size, self._micro_batch_size))

    def _source(self, start: int) -> _Source:
        """This rank's images from step `start` on; nothing at all where none are needed."""
        if not self._with_images:
            return _Source(lambda draw: None, None)
        ready = min(self._rank_batch_size // self._micro_batch_size, _READY_BATCHES, _READY_BYTES // self._batch_bytes)
        loader = _in_workers(self._read, self._draws(start), self._config, ready)
        return _Source(self._read, None if loader is None else zip(self._draws(start), loader, strict=False))

    @property
    def _batch_bytes(self) -> int:
        return 4 * self._micro_batch_size * math.prod(self._dataset.image_shape)

    def _draws(self, start: int) -> Iterator[int]:
        """The first draw of each of this rank's micro-batches."""
        for step in itertools.count(start):
            first = self._first_draw(step)
            yield from range(first, first + self._rank_batch_size, self._micro_batch_size)

    def _first_draw(self, step: int) -> int:
        return self._offset + step * self._global_batch_size + self._data_rank * self._rank_batch_size

    def _batch(self, first_draw: int, source: _Source) -> Batch:
        """The micro-batch that begins with a draw. Counts the time that it takes."""
        asked = time.perf_counter()
        draws = np.arange(first_draw, first_draw + self._micro_batch_size)
        batch = Batch(
            images=source.take(first_draw),
            labels=torch.from_numpy(self._dataset.labels[self._order.indices(draws)]),
            sample_ids=torch.from_numpy(draws),
            weights=torch.ones(len(draws), dtype=torch.float32),
        )
        self.waited += time.perf_counter() - asked
        return batch

    def _read(self, first_draw: int) -> Tensor:
        """The images of a micro-batch, augmented and normalised: [B, C, H, W]."""
        dataset, config = self._dataset, self._config
        indices = self._order.indices(np.arange(first_draw, first_draw + self._micro_batch_size))
        augmentation = draw_augmentation(config, self._seed, first_draw, len(indices))
        crop_when_read = config.crops and dataset.crops_when_read
        images = dataset.read(indices, augmentation.crop if crop_when_read else None)
        return self._normalise(augment(images, augmentation, config, crop=config.crops and not crop_when_read))


class StepBatches(Sequence[Batch]):
    """One rank's micro-batches of one step. Item m is read when it is asked for, or was, ahead of that, by a worker.

    Only the item asked for last is held. Any other may be asked for in any order, again, and after later steps: it is a
    function of (seed, draw), and read anew, in this process, if the stream is past it.
    """

    def __init__(self, stream: TrainStream, source: _Source, draws: range) -> None:
        self._stream, self._source, self._draws = stream, source, draws
        self._last: tuple[int, Batch] | None = None

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, m: Any) -> Any:
        draw = self._draws[m]
        if self._last is None or self._last[0] != draw:
            self._last = None  # the memory of one, not of two
            self._source.forget_before(self._draws.start)
            self._last = draw, self._stream._batch(draw, self._source)
        return self._last[1]


class _Source:
    """Images by the first draw of their micro-batch.

    Args:
        read: gives those of any draw. ahead: (draw, images) of one draw after the other, as workers have read them;
            None: no workers.
    """

    def __init__(self, read: Callable[[int], Tensor | None], ahead: Iterator[tuple[int, Tensor]] | None) -> None:
        self._read, self._ahead = read, ahead
        self._next = 0  # the stream is past all draws below
        self._passed: dict[int, Tensor] = {}  # of those, which were not asked for yet

    def take(self, draw: int) -> Tensor | None:
        """The images of `draw`. What the workers have read before it is kept until it is asked for or forgotten."""
        if draw in self._passed:
            return self._passed.pop(draw)
        if self._ahead is None or draw < self._next:
            return self._read(draw)
        try:
            while (ahead := next(self._ahead))[0] != draw:
                self._passed[ahead[0]] = ahead[1]
        except Exception:
            self._ahead = None  # workers end now; those that the garbage collector finds take 5 s each to end
            raise
        self._next = draw + 1
        return ahead[1]

    def forget_before(self, draw: int) -> None:
        """Drop what was passed of earlier steps: they are over."""
        for passed in [p for p in self._passed if p < draw]:
            del self._passed[passed]


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
        firsts = range(first, first + len(self) * stride, stride)
        loader = _in_workers(self._read, firsts, self._config, ready=0) if self._with_images else None
        for first in firsts:
            yield self._batch(first, None if not self._with_images else next(loader) if loader else self._read(first))

    def _indices(self, first_index: int) -> NDArray[np.int64]:
        return np.arange(first_index, min(first_index + self._micro_batch_size, len(self._dataset)))

    def _read(self, first_index: int) -> Tensor:
        """The images of a micro-batch, normalised, padding with them: [B, C, H, W]."""
        indices = self._indices(first_index)
        padding = (0, 0, 0, 0, 0, 0, 0, self._micro_batch_size - len(indices))
        return self._normalise(F.pad(self._dataset.read(indices), padding))

    def _batch(self, first_index: int, images: Tensor | None) -> Batch:
        indices = self._indices(first_index)
        missing = self._micro_batch_size - len(indices)
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


class _Images(TorchDataset["Tensor | UnreadableImageError"]):
    """A map-style data set whose items are the images of whole micro-batches, by their first draw or index.

    An image that cannot be read is handed over, not raised: torch would wrap the worker's traceback around it.
    """

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read = read

    def __getitem__(self, first: int) -> Tensor | UnreadableImageError:
        try:
            return self._read(first)
        except UnreadableImageError as error:
            return error.with_traceback(None)


def _in_workers(
    read: Callable[[int], Tensor], keys: Iterable[int], config: DataConfig, ready: int
) -> Iterator[Tensor] | None:
    """read(key) for each key, in their order, ahead of time in worker processes; None if there are to be none.

    At least two micro-batches per worker are read ahead of what is asked for, and at least `ready` of them in all. Only
    images come from there, as memory that is shared: one open file per micro-batch.
    """
    if config.workers == 0:
        return None
    loader: DataLoader[Tensor | UnreadableImageError] = DataLoader(
        _Images(read),
        batch_size=None,  # items are batches already
        sampler=keys,
        num_workers=config.workers,
        multiprocessing_context="fork",  # else, from Python 3.14 on, a server's children, which do not end with us
        prefetch_factor=max(2, math.ceil(ready / config.workers)),
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # its own, so that workers leave the global random state alone
    )
    return map(_read_well, read_ahead(loader))


def _read_well(item: Tensor | UnreadableImageError) -> Tensor:
    if isinstance(item, UnreadableImageError):
        try:
            raise item
        finally:
            del item  # else this frame and the error hold each other, and workers that are freed so end 5 s later each
    return item
