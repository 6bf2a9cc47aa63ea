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


def part_(sums: Tensor) -> Tensor:
    """Log-sum-exp of each series in two parts, the largest and the log of the sum under it, in place: [n, 2].

    As one number of fp32, about 100 at a scale of 100, it would be off by up to 4e-6, and a pair's 1 - p with it: all
    of the gradient that pairs which are found have. A logit less the largest has all its digits.
    """
    sums[:, 1].log_()
    return sums


def log_sum(sums: Tensor) -> Tensor:
    """Log-sum-exp of each series as one number, of fp64: [n, 2] -> [n]."""
    wide = sums.double()
    return wide[:, 0] + wide[:, 1].log()


def log_shares(logits: Tensor, parts: Tensor, dim: int, out: Tensor) -> Tensor:
    """log p of logits [r, c] in their series: rows [r, 2] of `parts`, or columns [c, 2], into `out`, which may be they.

    Args:
        dim: along which a series lies: 1, a row; 0, a column.
    """
    largest, log = parts.t().unsqueeze(2 if dim else 1)
    return torch.sub(logits, largest, out=out).sub_(log)
