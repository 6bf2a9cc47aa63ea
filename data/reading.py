"""What takes time to make of a micro-batch, in this process or, ahead of the training loop, in workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.errors import UnreadableImageError
from data.work import NO_WORK, Work, timed
from data.workers import begin_worker, read_ahead


class BadSample(NamedTuple):
    """A sample that cannot be used.

    Attributes:
        place: its draw in training, its number in evaluation. sample: its number in the set. cause: in one line.
        instead: the number of the sample in its place; None: it was left out.
    """

    place: int
    sample: int
    cause: str
    instead: int | None


@dataclass(frozen=True)
class Content:
    """Images and texts of a micro-batch; None where they are not needed.

    Attributes:
        images: [B, C, H, W], normalised. texts: int64 [B, S]; an array, since it takes less to send from a worker.
        texts_cut: how many of the texts were too long.
        indices: [B] the samples that it is of, -1 for those left out; None: nothing was made.
        bad: those that it would have been of.
        maps: rows and columns of patches of each image, where images have several sizes; images are then their
            patches (data.resolution).
        work: that it was.
    """

    images: Tensor | None = None
    texts: NDArray[np.int64] | None = None
    texts_cut: int = 0
    indices: NDArray[np.int64] | None = None
    bad: tuple[BadSample, ...] = ()
    maps: tuple[tuple[int, int], ...] | None = None
    work: Work = NO_WORK

    def pin_memory(self) -> Content:
        """The same with images in pinned memory: what torch's loader calls."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())


Read = Callable[[int], Content]
"""Makes a micro-batch's content, by its first draw or index."""


def timed_read(read: Read) -> Read:
    """The same, with the work that it was."""

    def timing(key: int) -> Content:
        content, work = timed(lambda: read(key))
        return replace(content, work=work)

    return timing


class Source:
    """Content by the first draw of its micro-batch.

    Args:
        read: gives that of any draw. ahead: (draw, content) of one draw after the other, as workers have read them;
            None: no workers.
    """

    def __init__(self, read: Read, ahead: Iterator[tuple[int, Content]] | None) -> None:
        self._read, self._ahead = read, ahead
        self._next = 0  # the stream is past all draws below
        self._passed: dict[int, Content] = {}  # of those, which were not asked for yet

    def take(self, draw: int) -> Content:
        """That of `draw`. What the workers have read before it is kept until it is asked for or forgotten."""
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


class _Items(TorchDataset["Content | UnreadableImageError"]):
    """A map-style data set whose items are the contents of whole micro-batches, by their first draw or index.

    An image that cannot be read is handed over, not raised: torch would wrap the worker's traceback around it.
    """

    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitem__(self, first: int) -> Content | UnreadableImageError:
        try:
            return self._read(first)
        except UnreadableImageError as error:
            return error.with_traceback(None)


def in_workers(
    read: Read, keys: Iterable[int], workers: int, ready: int, *, pins: bool = False
) -> Iterator[Content] | None:
    """read(key) for each key, in their order, ahead of time in worker processes; None if there are to be none.

    At least two micro-batches per worker are read ahead of what is asked for, and at least `ready` of them in all.
    Images come from there as memory that is shared, one open file per micro-batch, texts through a pipe. With `pins` a
    thread copies images into pinned memory, which a GPU reads by itself.
    """
    if workers == 0:
        return None
    loader: DataLoader[Content | UnreadableImageError] = DataLoader(
        _Items(read),
        batch_size=None,  # items are batches already
        sampler=keys,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",  # else, from Python 3.14 on, a server's children, which do not end with us
        prefetch_factor=max(2, math.ceil(ready / workers)),
        pin_memory=pins,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # its own, so that workers leave the global random state alone
    )
    return map(_read_well, read_ahead(loader))


def _as_it_is(item: Any) -> Any:
    """torch's own way would make tensors of arrays, each of them an open file."""
    return item


def _read_well(item: Content | UnreadableImageError) -> Content:
    if isinstance(item, UnreadableImageError):
        try:
            raise item
        finally:
            del item  # else this frame and the error hold each other, and workers that are freed so end 5 s later each
    return item
