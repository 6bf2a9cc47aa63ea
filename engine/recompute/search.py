"""The least time within a limit of bytes: dynamic programming over a rank's layers, with bounds.

After each layer those states are left that no other is as good as in every column, and that may yet become better than
the best solution known (`engine.recompute.bounds`). A first pass that looks at few states after each layer finds a
solution that is good, if not the best; with it the last pass, which leaves out nothing that could be better, sees
little more. (Dynamic programming with bounds: Morin & Marsten 1976.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.recompute.bounds import Bounds
from engine.recompute.choices import MOMENTS, TIME, Floats, Ints, Rank, least

WIDTHS = (30, 300, None)
"""States that each pass looks at after a layer."""


class Found(NamedTuple):
    """A solution: ticks, the peak beside what is alive all the time, and the choice for each layer."""

    time: int
    peak: int
    choices: tuple[int, ...]


class Search:
    """For the best solutions of a rank: the least time within a limit, of those the least peak."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.bounds = rank, Bounds(rank)

    def within(self, limit: int) -> Found | None:
        """The best solution with a peak of at most so many bytes, or None where there is none."""
        self.bounds.weigh(limit)
        best: Found | None = None
        for width in WIDTHS:
            found, all_seen = self._pass(limit, best, width)
            best = found or best
            if all_seen:
                break
        return best

    def _pass(self, limit: int, best: Found | None, width: int | None) -> tuple[Found | None, bool]:
        """A solution that is better than the best, and whether none was left out that could have been."""
        states, all_seen = self.rank.start, True
        trace = list[tuple[NDArray[np.intp], NDArray[np.intp]]]()
        for layer, choices in enumerate(self.rank.layers):
            states = self.rank.choose(states, layer)
            bound, peak, left = self._bound(states, layer + 1, limit, best)
            some = _first(left, bound, peak, None if width is None else 8 * width)
            some = some[least(states[some])] if len(some) else some
            few = _first(some, bound, peak, width)
            all_seen &= len(few) == len(some) <= len(left) and (width is None or len(left) <= 8 * width)
            trace.append((few // len(choices.names), few % len(choices.names)))
            states = states[few]
        return _best(states, trace), all_seen

    def _bound(
        self, states: Ints, layer: int, limit: int, best: Found | None
    ) -> tuple[Floats, Floats, NDArray[np.intp]]:
        """Time and peak that states lead to at least, and those states that may lead to a better solution."""
        chosen, time = self.bounds.chosen(states, layer), states[:, TIME]
        bound, peak = time + self.bounds.times_after(chosen, layer, limit), self.bounds.peaks(chosen, layer)
        if best is None:
            return bound, peak, np.flatnonzero(bound < np.inf)
        better = bound < best.time
        (equal,) = np.nonzero(bound == best.time)
        lower = self.bounds.times_after(chosen[:, equal], layer, best.peak - 1)
        better[equal] = time[equal] + lower <= best.time
        return bound, peak, np.flatnonzero(better)


def _first(states: NDArray[np.intp], bound: Floats, peak: Floats, count: int | None) -> NDArray[np.intp]:
    """So many of the states, those with the least bounds, ascending."""
    if count is None or len(states) <= count:
        return states
    return np.sort(states[np.lexsort((peak[states], bound[states]))[:count]])


def _best(states: Ints, trace: list[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> Found | None:
    """The best of the last states, with the choices that led there."""
    if not len(states):
        return None
    peaks = states[:, MOMENTS:].max(axis=1)
    at = best = int(np.lexsort((peaks, states[:, TIME]))[0])
    choices = list[int]()
    for before, chosen in reversed(trace):
        choices.append(int(chosen[at]))
        at = int(before[at])
    return Found(int(states[best, TIME]), int(peaks[best]), tuple(reversed(choices)))
