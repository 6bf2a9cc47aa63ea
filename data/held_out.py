"""A fifth of any set held out by a rule for each sample alone, so that nothing of the set's size is kept.

Of every five samples that follow each other one is held out, which one is drawn by their place. The samples of a class
may follow each other, or come in turn: each is held out in its share all the same. What is trained on stays in order,
so that the samples of a shard still follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.keyed import Purpose, keyed_words
from data.permutation import hashed

FOLDS = 5
"""Sets without a held-out part of their own are dealt into this many stratified folds, and one of them is held out."""


@dataclass(frozen=True)
class Part:
    """Of `size` samples those of fold `fold`, held out, or the others.

    Attributes:
        is_held_out: which of the two.
    """

    size: int
    fold: int
    is_held_out: bool

    def __len__(self) -> int:
        return int(self.before(np.array([self.size]))[0])

    def before(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of this part are among the first `samples` of the set: [B] -> [B]."""
        fives, rest = np.divmod(samples, FOLDS)
        held_out = fives + (rest > self._drawn(fives))
        return held_out if self.is_held_out else samples - held_out

    def samples(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number in the set of each sample of this part: [B] -> [B]."""
        if self.is_held_out:  # of the last samples, fewer than five, one may be drawn that is not there: then none is
            return FOLDS * indices + self._drawn(indices)
        fives, rest = np.divmod(indices, FOLDS - 1)
        return FOLDS * fives + rest + (rest >= self._drawn(fives))

    def _drawn(self, fives: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of each five is held out."""
        key = keyed_words(0, Purpose.SPLIT, 0, 1)[0]  # the same for every seed
        return (hashed(fives.astype(np.uint64), key, np.uint64(FOLDS)).astype(np.int64) + self.fold) % FOLDS
