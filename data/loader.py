"""Micro-batches for one data-parallel rank, the same images, pixels and texts in every layout.

Shapes: B images per micro-batch, C channels, H x W pixels, S tokens of a text. G is the global batch size.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.batch import Batch, batch_of
from data.blending import Blend, blend, draw_blend, partners, with_partners
from data.config import DataConfig
from data.datasets import Dataset
from data.mending import Mender
from data.mixing import sample_order
from data.portions import Circle, Portions
from data.reading import BadSample, Content, Source, in_workers, timed_read
from data.relay import Agreement, Relay
from data.resolution import check_pairs
from data.work import NO_WORK

# What workers hold ready beyond what each is at work on: enough for a schedule that takes micro-batches in bursts.
# Every one is an open file, and memory of the host in which few files may be open and little may be shared.
_READY_BATCHES, _READY_BYTES = 64, 64 * 2**20


class TrainStream:
    """The endless training stream, as one data-parallel rank sees it.

    A global batch is G consecutive draws (see data.sampling). They are dealt to the data ranks in contiguous pieces,
    and these are cut into micro-batches. An image's pixels and its text depend on (seed, draw) alone. Pipeline stages
    that need no images or no texts say so, and none are made; there are texts only if the set has a tokenizer. Step s
    begins with draw s G + `offset`: not 0 where the first steps of a run had another G. Other samples stand in for bad
    ones (data.mending), the same on all ranks that share micro-batches if these have a `relay`. With `pins` workers'
    images are in pinned memory. Ranks of a `circle`, all of which decide on bad samples, make a portion of the images
    each (data.portions).

    Attributes:
        waited: seconds in all that the caller has waited for micro-batches; without workers, the time to read them.
        work: what making them was in all, in workers or here.
        texts_cut: how many texts of the micro-batches that were asked for were longer than the text tower reads, each
            counted once a step.
        bad: samples that others stand in for, of the micro-batches that were asked for, each once a step, on ranks that
            find them.

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
        with_texts: bool = True,
        offset: int = 0,
        relay: Relay | None = None,
        pins: bool = False,
        circle: Circle | None = None,
    ) -> None:
        assert 0 <= data_rank < data_size
        _check_batch_sizes(global_batch_size, micro_batch_size, data_size)
        if dataset.resolution is not None:
            check_pairs(micro_batch_size)
        if seed < 0:
            raise ValueError(f"the seed is {seed}: it must be 0 or more")
        self.waited, self.work, self.texts_cut, self.bad = 0.0, NO_WORK, 0, list[BadSample]()
        self._dataset = dataset
        self._config = config
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank_batch_size = global_batch_size // data_size
        self._data_rank = data_rank
        self._seed, self._offset, self._pins = seed, offset, pins
        self._order = sample_order(dataset, seed, config)
        self._agreement = Agreement(relay)
        decides = with_images if relay is None else relay.decides
        self._mender = Mender(
            dataset, config, with_images=with_images, with_texts=with_texts, decides=decides, seed=seed
        )
        assert not (config.mixes and self._mender.makes_texts), "texts of mixed images are refused before"
        says = self._mender.says
        self._portions = None if circle is None else Portions(circle, micro_batch_size, config, says=says)

    def steps(self, start: int) -> Iterator[StepBatches]:
        """This rank's micro-batches of step `start`, of the step after it, and so on without end.

        They are read while the step goes on, see StepBatches.
        """
        source = self._source(start)
        for step in itertools.count(start):
            first = self._first_draw(step)
            yield StepBatches(self, source, range(first, first + self._rank_batch_size, self._micro_batch_size))

    def _source(self, start: int) -> Source:
        """What this rank needs from step `start` on."""
        if not self._mender.needs_any:
            return Source(lambda draw: Content(), None)
        ready = min(self._rank_batch_size // self._micro_batch_size, _READY_BATCHES, _READY_BYTES // self._batch_bytes)
        read = timed_read(self._read)
        loader = in_workers(read, self._draws(start), self._config.workers, ready, pins=self._pins)
        return Source(read, None if loader is None else zip(self._draws(start), loader, strict=False))

    @property
    def _batch_bytes(self) -> int:
        samples = self._micro_batch_size if self._portions is None else self._portions.cut.rows
        return 4 * self._config.all_views * samples * math.prod(self._dataset.image_shape)

    def _draws(self, start: int) -> Iterator[int]:
        """The first draw of each of this rank's micro-batches."""
        for step in itertools.count(start):
            first = self._first_draw(step)
            yield from range(first, first + self._rank_batch_size, self._micro_batch_size)

    def _first_draw(self, step: int) -> int:
        return self._offset + step * self._global_batch_size + self._data_rank * self._rank_batch_size

    def _batch(self, first_draw: int, number: int, source: Source, *, again: bool) -> Batch:
        """The micro-batch that begins with a draw. Counts its time, and what is in it unless it is read again."""
        asked = time.perf_counter()
        count, portions = self._micro_batch_size, self._portions
        read, own, others = self._draws_of(first_draw, count)
        content = source.take(first_draw)
        self.work += content.work
        if portions is not None:
            part = portions.part(first_draw)
            at = int(self._draws_of(part.start, len(part))[0][0] - read[0])
            content = portions.whole(content, self._order.indices(read), at, part)
        found = self._order.indices(read) if content.indices is None else content.indices
        indices = self._agreement.of(first_draw, number, found)
        if self._mender.needs_any and (content.indices is None or not np.array_equal(indices, content.indices)):
            assert portions is None, "who makes portions decides"
            content = self._mixed(self._mender.training_of(indices, int(read[0])), first_draw, count)
        draws = read[own]
        batch = batch_of(self._dataset, content, indices[own], torch.from_numpy(draws), 0, self._config.all_views)
        if self._config.mixes:
            labels = torch.from_numpy(self._dataset.labels_of(indices[others]))
            shares = torch.from_numpy(self._blend(first_draw, count).shares)
            batch = replace(batch, other_labels=labels, own_shares=shares)
        if not again:
            self.texts_cut += content.texts_cut
            self.bad += [bad for bad in content.bad if bad.place in draws]  # those of partners are counted elsewhere
        self.waited += time.perf_counter() - asked
        return batch if portions is None else replace(batch, cut=portions.cut)

    def _begin(self, first_draw: int, source: Source) -> None:
        """What is asked for now is of the step that begins so."""
        source.forget_before(first_draw)
        self._agreement.begin(first_draw)

    def _read(self, first_draw: int) -> Content:
        if self._portions is None:
            return self._made(first_draw, self._micro_batch_size)
        part = self._portions.part(first_draw)
        return self._portions.filled(self._made(part.start, len(part)))

    def _made(self, first_draw: int, count: int) -> Content:
        read, _, _ = self._draws_of(first_draw, count)
        return self._mixed(self._mender.training(self._order.indices(read), int(read[0])), first_draw, count)

    def _mixed(self, content: Content, first_draw: int, count: int) -> Content:
        """What was made of the draws that are read, as what is made of `count` from one on."""
        if not self._config.mixes or content.images is None:
            return content
        _, own, others = self._draws_of(first_draw, count)
        return replace(content, images=blend(content.images, own, others, self._blend(first_draw, count)))

    def _draws_of(self, first_draw: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of `count` draws from one on: (draws that are read for them, one after the other; where in these they are;
        where those are that they are mixed with, if they are)."""
        repeats = self._config.repeats
        own = np.arange(first_draw, first_draw + count)
        read = with_partners(first_draw, count, repeats) if self._config.mixes else own
        return read, own - read[0], partners(own, repeats) - read[0]

    def _blend(self, first_draw: int, count: int) -> Blend:
        _, height, width = self._dataset.image_shape
        return draw_blend(self._config, self._seed, first_draw, count, height, width)


class StepBatches(Sequence[Batch]):
    """One rank's micro-batches of one step. Item m is read when it is asked for, or was, ahead of that, by a worker.

    Only the item asked for last is held. Any other may be asked for in any order, again, and after later steps: it is a
    function of (seed, draw), and read anew, in this process, if the stream is past it.
    """

    def __init__(self, stream: TrainStream, source: Source, draws: range) -> None:
        self._stream, self._source, self._draws = stream, source, draws
        self._last: tuple[int, Batch] | None = None
        self._asked: set[int] = set()

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, m: Any) -> Any:
        draw = self._draws[m]
        if self._last is None or self._last[0] != draw:
            self._last = None  # the memory of one, not of two
            self._stream._begin(self._draws.start, self._source)
            number = self._draws.index(draw)
            self._last = draw, self._stream._batch(draw, number, self._source, again=draw in self._asked)
            self._asked.add(draw)
        return self._last[1]


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
