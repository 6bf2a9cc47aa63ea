"""The order in which training sees images, a function of (seed, epoch, position) alone.

The stream is the permutations of epoch 0, 1, 2, ... end to end: no remainder is dropped, a global batch may span two
epochs. Each image may come several times in a row (repeated augmentation; Hoffer et al. 2020). A position in the stream
is called a draw: it counts images seen. The global batch of step t is the draws
[t*G, (t+1)*G), so neither the layout nor a restart changes what a step trains on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.keyed import Purpose, keyed_permutation


class SampleOrder:
    """Maps draws (0, 1, 2, ... = images seen so far) to indices into a data set of `size` images, `repeats` draws to
    each."""

    def __init__(self, size: int, seed: int, repeats: int = 1) -> None:
        self.size, self.seed, self.repeats = size, seed, repeats
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def indices(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of the image at each draw: [B] -> [B]."""
        epochs, positions = np.divmod(draws // self.repeats, self.size)
        indices = np.empty_like(draws)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._permutation(int(epoch))[positions[chosen]]
        return indices

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a batch seldom spans more than two epochs: keep this one and one other
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = keyed_permutation(self.seed, Purpose.ORDER, epoch, self.size)
        return self._permutations[epoch]
