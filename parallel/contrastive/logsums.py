"""Log-sum-exp of many series at once, added up block by block under running maxima.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax". All in the type of the logits, fp32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUND = 60.0
"""exp(60) of 10^11 logits can be added up in fp32, and exp(-60) has all its digits."""


class LogSums:
    """Of n series the largest value so far, and the sum of exponentials under it.

    Args:
        values: [n, 2], these numbers, in place. bounded: whether no logit is larger than BOUND, whatever its sign, so
            that exponentials need no maximum.
    """

    def __init__(self, values: Tensor, *, bounded: bool = False) -> None:
        self.values, self._bounded = values, bounded

    @classmethod
    def none(cls, count: int, like: Tensor, *, bounded: bool = False) -> LogSums:
        """Series of no elements, in new memory."""
        return cls(like.new_empty(count, 2), bounded=bounded).clear()

    def clear(self) -> LogSums:
        """Series of no elements."""
        self.values[:, 0] = 0.0 if self._bounded else torch.finfo(self.values.dtype).min  # less itself 0, not no number
        self.values[:, 1] = 0.0
        return self

    def add(self, place: slice, tile: Tensor, dim: int, room: Tensor) -> None:
        """Elements of `tile` along `dim` to the series at `place`. room: for exponentials, or the tile itself."""
        largest, total = self.values[place].unbind(1)
        new = torch.maximum(tile.amax(dim), largest)
        total.mul_(torch.exp(largest - new))
        largest.copy_(new)
        torch.sub(tile, new.unsqueeze(dim), out=room).exp_()
        total.add_(room.sum(dim))

    def add_exponentials(self, place: slice, exponentials: Tensor, dim: int) -> None:
        """The same of what is bounded."""
        self.values[place, 1] += exponentials.sum(dim)

    def merge(self, other: Tensor) -> None:
        """Sums [n, 2] of the same series over other elements."""
        if not self._bounded:
            new = torch.maximum(self.values[:, 0], other[:, 0])
            self.values[:, 1] *= torch.exp(self.values[:, 0] - new)
            self.values[:, 1] += other[:, 1] * torch.exp(other[:, 0] - new)
            self.values[:, 0] = new
        else:
            self.values[:, 1] += other[:, 1]


def log_sum(sums: Tensor) -> Tensor:
    """Log-sum-exp of each series: [n, 2] -> [n]."""
    return sums[:, 0] + sums[:, 1].log()
