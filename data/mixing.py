"""Samples of several sources in given shares, exact to one sample at every moment, worked out draw by draw.

Shares are whole numbers a_i of a period of W draws. Within it the rule is that of proportionate fairness (Baruah,
Cohen, Plaxton and Varvel, "Proportionate progress", 1996): the c-th sample of a source is due from draw
floor((c-1) W / a_i) and before ceil(c W / a_i); of those that are due the one that must come first is taken. On one
machine that meets every deadline, so after any n draws a source has had n a_i / W samples, give or take less than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.datasets import Dataset
from data.sampling import RULE, SampleOrder

_LONGEST = 100_000  # draws of a period: shares of up to five digits


class Order(Protocol):
    """Which sample each draw is."""

    def indices(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B] -> [B]."""
        ...


def sample_order(dataset: Dataset, seed: int, config: DataConfig) -> Order:
    """Of a data set by its configuration: all its samples alike, or its sources in the shares of data.weights."""
    ends, shards, window = dataset.source_ends, dataset.shard_ends, config.shuffle_window
    if not config.weights or ends is None:
        return SampleOrder(len(dataset), seed, config.repeats, shard_ends=shards, window=window)
    orders = []
    for number, (first, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        own = None if shards is None else shards[(shards > first) & (shards <= end)] - first
        orders.append(SampleOrder(end - first, seed, shard_ends=own, window=window, stream=number))
    return MixedOrder(orders, whole_shares(config.weights), config.repeats)


def has_empty_source(dataset: Dataset) -> bool:
    """Whether a set has several sources, and no sample of one of them."""
    ends = dataset.source_ends
    return ends is not None and not np.diff(ends, prepend=0).all()


def order_of(config: DataConfig) -> str:
    """Names the rule by which draws become samples: a run that goes on with another would see some samples twice in an
    epoch, and others not at all."""
    windows = f", {config.shuffle_window} shards at a time" if config.shuffle_window else ""
    shares = f", sources {':'.join(map(str, whole_shares(config.weights)))}" if config.weights else ""
    return RULE + windows + shares


class MixedOrder(Order):
    """Sources whose samples follow each other in a set, each in an order of its own.

    Args:
        orders: of each source. shares: of each, how many draws of a period are its own.
    """

    def __init__(self, orders: Sequence[SampleOrder], shares: Sequence[int], repeats: int = 1) -> None:
        assert len(orders) == len(shares)
        self._orders, self._repeats = orders, repeats
        self._shares = np.array(shares, dtype=np.int64)
        self._firsts = np.cumsum([0, *(order.size for order in orders[:-1])])
        self._sources, self._before = period(shares)

    def indices(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """As Order."""
        periods, places = np.divmod(draws // self._repeats, len(self._sources))
        sources = self._sources[places]
        own = periods * self._shares[sources] + self._before[places]  # draws that the source has had before
        indices = np.empty_like(draws)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            indices[chosen] = self._firsts[source] + self._orders[source].indices(own[chosen])
        return indices


def period(shares: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the source of each draw of a period [W], how many of the draws before are that source's [W])."""
    total, had = sum(shares), [0] * len(shares)
    sources, before = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    for draw in range(total):
        due = [source for source, share in enumerate(shares) if had[source] * total // share <= draw]
        source = min(due, key=lambda source: (-(-(had[source] + 1) * total // shares[source]), source))
        sources[draw], before[draw] = source, had[source]
        had[source] += 1
    return sources, before


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The least whole numbers in the proportions of some weights, as they were written.

    Raises:
        ValueError: they are no shares, or so exact that their period is too long.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"data.weights is {list(weights)}: give numbers above 0, one for each source")
    written = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in written))
    whole = [int(weight * scale) for weight in written]
    whole = [share // math.gcd(*whole) for share in whole]
    if sum(whole) > _LONGEST:
        raise ValueError(
            f"data.weights is {list(weights)}, which repeats itself after {sum(whole)} draws, more than {_LONGEST}: "
            "round them"
        )
    return whole
