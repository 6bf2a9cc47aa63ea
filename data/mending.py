"""Micro-batches of good samples: in training another stands in for one that is bad, in evaluation it is left out.

Bad is a sample whose image is missing or cannot be decoded, of which nothing is said where captions are read, or whose
label is none: a fault of the data, alike wherever it is read. Which sample stands in is a function of (seed, draw) and
of the data alone. So no layout, worker count or restart changes it, and nothing of it needs to be saved. A disk or a
network that fails is no fault of a sample: it ends the run, as ranks may see it differently.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data.captions import Look
from data.config import DataConfig
from data.datasets import Dataset
from data.errors import BadSampleError, TooManyBadError
from data.keyed import Purpose, keyed_words
from data.making import Maker
from data.reading import BadSample, Content

TRIES = 16
"""Samples drawn in the place of one, before it is the whole set that is bad."""

LEFT_OUT = -1
"""The number of a sample that is not there."""


class Mender:
    """Makes what a rank needs of micro-batches, of good samples.

    Args:
        decides: this rank finds out which samples are bad, all that is wanted of them by anybody; others are told, and
            of a micro-batch with a bad sample they make nothing before.
        seed: of the run. mends: False: a bad sample is an error, as it is where the configuration allows none.

    Attributes:
        says: whether more is known of what was made than which samples were drawn.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        with_images: bool,
        with_texts: bool,
        decides: bool,
        seed: int = 0,
        mends: bool = True,
    ) -> None:
        self._dataset, self._repeats, self._seed = dataset, config.repeats, seed
        self._decides, self._mends = decides, mends and config.mends
        self._is_of_files = config.reads_files
        self._maker = Maker(dataset, config, with_images=with_images, with_texts=with_texts)
        self.needs_any, self.makes_texts = self._maker.needs_any, self._maker.makes_texts
        self.says = self._mends or self.makes_texts or dataset.resolution is not None

    def training(self, indices: NDArray[np.int64], first_draw: int) -> Content:
        """Of the samples at `indices`, drawn one after the other from `first_draw` on, or of those in their place.

        Raises:
            BadSampleError: for a bad sample, if none may be. TooManyBadError: for TRIES of them, one after the other.
        """
        try:
            return self.training_of(indices, first_draw)
        except BadSampleError:
            if not self._mends:
                raise
        if not self._decides:
            return Content()
        chosen, bad = indices.copy(), list[BadSample]()
        for row, index in enumerate(indices.tolist()):
            if (cause := self._fault(index)) is not None:
                chosen[row] = self._instead(index, first_draw + row)
                bad.append(BadSample(first_draw + row, index, cause, int(chosen[row])))
        return replace(self.training_of(chosen, first_draw), bad=tuple(bad))

    def training_of(self, indices: NDArray[np.int64], first_draw: int) -> Content:
        """The same of samples that somebody has found good. Raises BadSampleError if they are not."""
        self._check(indices)
        return replace(self._maker.training(indices, self._seed, first_draw), indices=indices)

    def held_out(self, indices: NDArray[np.int64], missing: int) -> Content:
        """Of the samples at `indices`, which follow each other, without bad ones; `missing` as of Maker."""
        try:
            return self.held_out_of(indices, indices, missing)
        except BadSampleError:
            if not self._mends:
                raise
        if not self._decides:
            return Content()
        causes = [(index, self._fault(index)) for index in indices.tolist()]
        bad = [BadSample(index, index, cause, None) for index, cause in causes if cause is not None]
        kept = np.where(np.isin(indices, [one.sample for one in bad]), LEFT_OUT, indices)
        return replace(self.held_out_of(indices, kept, missing), bad=tuple(bad))

    def held_out_of(self, indices: NDArray[np.int64], kept: NDArray[np.int64], missing: int) -> Content:
        """The same where somebody has found out which are bad: LEFT_OUT in `kept`."""
        self._check(kept[kept != LEFT_OUT])
        return replace(self._maker.held_out(indices, missing, kept != LEFT_OUT), indices=kept)

    def _instead(self, index: int, draw: int) -> int:
        """The sample that takes the place of a bad one, of its own source; repeats of an image have one. Where few
        labels are known it has one if the bad one had, and else none: an epoch tells as many labels as ever."""
        ends = self._dataset.source_ends
        first, end = 0, len(self._dataset)
        if ends is not None:
            source = int(np.searchsorted(ends, index, side="right"))
            first, end = int(ends[source - 1]) if source else 0, int(ends[source])
        alike = None
        if self._dataset.labelled is not None:
            known = self._dataset.labels[first:end] >= 0
            alike = first + np.flatnonzero(known == known[index - first])
        cause = None
        for word in keyed_words(self._seed, Purpose.SUBSTITUTE, 0, TRIES, draw // self._repeats).tolist():
            candidate = first + word % (end - first) if alike is None else int(alike[word % len(alike)])
            if (cause := self._fault(candidate)) is None:
                return candidate
        raise TooManyBadError(
            f"draw {draw}: sample {index} is bad, and so are {TRIES} others that were drawn in its place, the last: "
            f"{cause}: see whether the data are still where they were"
        )

    def _fault(self, index: int) -> str | None:
        """What is wrong with a sample."""
        one = np.array([index])
        try:
            self._check(one)
            self._dataset.read(one)
            self._check_captions(one)
        except BadSampleError as error:
            return str(error)
        return None

    def _check(self, indices: NDArray[np.int64]) -> None:
        """Raise BadSampleError for what making content would not notice."""
        if not self._is_of_files:
            return
        labels, classes = self._dataset.labels_of(indices), self._dataset.num_classes
        none_may_lack = self._dataset.labelled is None  # else they have been taken away
        if classes and len(wrong := np.flatnonzero((labels >= classes) | (none_may_lack & (labels < 0)))):
            index, label = int(indices[wrong[0]]), int(labels[wrong[0]])
            raise BadSampleError(f"sample {index} has label {label}, and labels are 0 to {classes - 1}")
        if self._decides and not self._maker.makes_texts:
            self._check_captions(indices)

    def _check_captions(self, indices: NDArray[np.int64]) -> None:
        captions = self._dataset.captions
        if captions is not None and self._dataset.texts is not None:
            for index, label in zip(indices.tolist(), self._dataset.labels_of(indices).tolist(), strict=True):
                captions.every(index, label, Look())
