"""Held-out images for one data-parallel rank, each once in all, the same in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from data.batch import Batch, batch_of
from data.config import DataConfig
from data.datasets import Dataset
from data.mending import Mender
from data.portions import Circle, Portions
from data.reading import BadSample, Content, in_workers
from data.relay import Relay


class EvalStream:
    """Every image exactly once over all data ranks, for each pass over the stream; unaugmented, unless `vary_held_out`.

    All ranks see the same number of batches of the same size; what is missing at the end is padded with black images of
    weight 0, label 0, id -1 and an empty text. An image's text is the first of its captions, or the one that says most.
    Of two views the first is the image itself, the second is augmented, the same way in every run. Bad samples end the
    pass or, with `leaves_out`, are padding in their place: an image that is not there counts for nothing.

    Args:
        span: numbers of the images; None: all. relay, pins, circle: as of TrainStream.

    Attributes:
        texts_cut: as of TrainStream. bad: samples that were left out, in each pass, on ranks that find them.
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
        with_texts: bool = True,
        span: range | None = None,
        leaves_out: bool = False,
        relay: Relay | None = None,
        pins: bool = False,
        circle: Circle | None = None,
    ) -> None:
        assert 0 <= data_rank < data_size
        self.texts_cut, self.bad = 0, list[BadSample]()
        self._dataset = dataset
        self._span = range(len(dataset)) if span is None else span
        self._config = config
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._relay, self._pins = relay, pins
        decides = with_images if relay is None else relay.decides
        self._mender = Mender(
            dataset, config, with_images=with_images, with_texts=with_texts, decides=decides, mends=leaves_out
        )
        says = self._mender.says
        self._portions = None if circle is None else Portions(circle, micro_batch_size, config, says=says)

    def __len__(self) -> int:
        """Batches per data rank."""
        return -(-len(self._span) // (self._micro_batch_size * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        first = self._span.start + self._data_rank * self._micro_batch_size
        stride = self._data_size * self._micro_batch_size
        firsts = range(first, first + len(self) * stride, stride)
        workers = self._config.workers if self._mender.needs_any else 0
        loader = in_workers(self._read, firsts, workers, ready=0, pins=self._pins)
        if self._relay is not None:
            self._relay.begin()
        for first in firsts:
            yield self._batch(first, next(loader) if loader else self._read(first))

    def _indices(self, places: range) -> NDArray[np.int64]:
        """Those of these places that the set has."""
        return np.arange(places.start, max(places.start, min(places.stop, self._span.stop)))

    def _read(self, first_index: int) -> Content:
        if not self._mender.needs_any:
            return Content()
        if self._portions is None:
            return self._made(range(first_index, first_index + self._micro_batch_size))
        return self._portions.filled(self._made(self._portions.part(first_index)))

    def _made(self, places: range) -> Content:
        indices = self._indices(places)
        return self._mender.held_out(indices, len(places) - len(indices))

    def _batch(self, first_index: int, content: Content) -> Batch:
        indices = self._indices(range(first_index, first_index + self._micro_batch_size))
        missing = self._micro_batch_size - len(indices)
        if self._portions is not None:
            part = self._portions.part(first_index)
            content = self._portions.whole(content, indices, part.start - first_index, part)
        kept = indices if content.indices is None else content.indices
        if self._relay is not None:
            kept = self._relay.pass_on(0, kept)
        if self._mender.needs_any and (content.indices is None or not np.array_equal(kept, content.indices)):
            content = self._mender.held_out_of(indices, kept, missing)
        self.texts_cut += content.texts_cut
        self.bad += content.bad
        batch = batch_of(self._dataset, content, kept, torch.from_numpy(indices), missing, self._config.all_views)
        return batch if self._portions is None else replace(batch, cut=self._portions.cut)
