"""The order in which training sees images, a function of (seed, epoch, position) alone.

The stream is the permutations of epoch 0, 1, 2, ... end to end: no remainder is dropped, a global batch may span two
epochs. Each image may come several times in a row (repeated augmentation; Hoffer et al. 2020). A position in the stream
is called a draw: it counts images seen. The global batch of step t is the draws
[t*G, (t+1)*G), so neither the layout nor a restart changes what a step trains on.

Where samples lie in shards that are far away, `window` of them may be read at a time: the order of shards is
shuffled, then the samples of as many shards that follow each other are. That takes a few numbers for each shard.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.keyed import Purpose, keyed_words
from data.permutation import ROUNDS, permuted

RULE = "Feistel, 16 rounds"
"""Names how draws become images: another rule is another name."""


class SampleOrder:
    """Maps draws (0, 1, 2, ... = images seen so far) to indices into a data set of `size` images, `repeats` draws to
    each.

    Args:
        shard_ends: [K] how many images there are up to and with each shard. window: shards, of which images are mixed
            at a time; 0: of all. stream: keeps apart the orders of sources that are mixed.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        repeats: int = 1,
        *,
        shard_ends: NDArray[np.int64] | None = None,
        window: int = 0,
        stream: int = 0,
    ) -> None:
        self.size, self.seed, self.repeats = size, seed, repeats
        self._first_key = stream << 40  # of more windows than there are
        self._shard_ends, self._window = shard_ends, window
        self._windows = lru_cache(maxsize=2)(self._windows_of)  # a batch seldom spans more than two epochs

    def indices(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of the image at each draw: [B] -> [B]."""
        epochs, positions = np.divmod(draws // self.repeats, self.size)
        indices = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = self._of_epoch(epoch, positions[chosen])
        return indices

    def _of_epoch(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._shard_ends is None or not self._window:
            return permuted(positions, self.size, _keys(self.seed, Purpose.ORDER, epoch, self._first_key))
        windows, places = self._windows(epoch), np.empty_like(positions)
        numbers = np.searchsorted(windows.ends, positions, side="right")
        for window in np.unique(numbers).tolist():
            chosen = numbers == window
            first = int(windows.ends[window - 1]) if window else 0
            keys = _keys(self.seed, Purpose.WINDOW, epoch, self._first_key + window)
            places[chosen] = first + permuted(positions[chosen] - first, int(windows.ends[window]) - first, keys)
        return places + windows.moved[np.searchsorted(windows.shard_ends, places, side="right")]

    def _windows_of(self, epoch: int) -> _Windows:
        ends = self._shard_ends
        assert ends is not None
        sizes, shards = np.diff(ends, prepend=0), len(ends)
        order = permuted(np.arange(shards), shards, _keys(self.seed, Purpose.SHARDS, epoch, self._first_key))
        shuffled_ends = np.cumsum(sizes[order])
        last = np.minimum(np.arange(self._window, shards + self._window, self._window), shards) - 1
        moved = (ends - sizes)[order] - (shuffled_ends - sizes[order])
        return _Windows(shuffled_ends[last], shuffled_ends, moved)


class _Windows(NamedTuple):
    """Of an epoch whose K shards are shuffled.

    ends: of each window. shard_ends: [K] of each shard, in their order now. moved: [K] from a place in that order to
    the index in the set.
    """

    ends: NDArray[np.int64]
    shard_ends: NDArray[np.int64]
    moved: NDArray[np.int64]


@lru_cache(maxsize=64)
def _keys(seed: int, purpose: Purpose, epoch: int, window: int = 0) -> NDArray[np.uint64]:
    return keyed_words(seed, purpose, epoch, ROUNDS, window)
