"""The order in which training sees images, a function of (seed, epoch, position) alone.

The stream is the permutations of epoch 0, 1, 2, ... end to end: no remainder is dropped, a global batch may span two
epochs. Each image may come several times in a row (repeated augmentation; Hoffer et al. 2020). A position in the stream
is called a draw: it counts images seen. The global batch of step t is the draws
[t*G, (t+1)*G), so neither the layout nor a restart changes what a step trains on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.keyed import Purpose, keyed_words
from data.permutation import ROUNDS, permuted

ORDER = "Feistel, 16 rounds"
"""Names the rule by which draws become images: a run that goes on with another would see some images twice in an epoch,
and others not at all. Another rule is another name."""


class SampleOrder:
    """Maps draws (0, 1, 2, ... = images seen so far) to indices into a data set of `size` images, `repeats` draws to
    each."""

    def __init__(self, size: int, seed: int, repeats: int = 1) -> None:
        self.size, self.seed, self.repeats = size, seed, repeats

    def indices(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of the image at each draw: [B] -> [B]."""
        epochs, positions = np.divmod(draws // self.repeats, self.size)
        indices = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = permuted(positions[chosen], self.size, _keys(self.seed, epoch))
        return indices


@lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    return keyed_words(seed, Purpose.ORDER, epoch, ROUNDS)
