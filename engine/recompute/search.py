"""The least time within a limit of bytes: dynamic programming over a rank's layers, with bounds.

After each layer those states are left that no other is as good as in every column, and that may yet become better than
the best solution known (`engine.recompute.bounds`; dynamic programming with bounds: Morin & Marsten 1976). A first pass
that looks at few states after each layer finds a solution that is good, if not the best; with it the last pass, which
leaves out nothing that could be better, sees little more.

Of several stages the last pass goes through each by itself, as if it came first, with the bound for all others; what is
left of each is then joined, stage by stage.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.recompute.bounds import Bounds
from engine.recompute.choices import MOMENTS, TIME, Floats, Ints, Rank, least

FEW, MORE = 30, 300
"""States that the first passes look at after a layer."""
AT_ONCE = 2**16
"""States that are joined at a time: some 20 MB."""


class Found(NamedTuple):
    """A solution: ticks, the peak beside what is alive all the time, and the choice for each layer."""

    time: int
    peak: int
    choices: tuple[int, ...]


class Some(NamedTuple):
    """States, and the choices for the layers that led there: [states, layers]."""

    states: Ints
    choices: NDArray[np.int16]

    def those(self, which: NDArray[np.intp]) -> Some:
        return Some(self.states[which], self.choices[which])


class Search:
    """For the best solutions of a rank: the least time within a limit, of those the least peak."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self._bounds = rank, Bounds(rank)
        self._stages = list[Search]()

    def within(self, limit: int) -> Found | None:
        """The best solution with a peak of at most so many bytes, or None where there is none."""
        self._bounds.weigh(limit)
        best: Found | None = None
        for width in (FEW, MORE, None) if len(self.rank.stages) == 1 else (FEW,):
            some, all_seen = self._pass(limit, best, width, len(self.rank.layers))
            best = _best(some) or best
            if all_seen:
                return best
        return self._by_stages(limit, best)

    def _pass(self, limit: int, best: Found | None, width: int | None, layers: int) -> tuple[Some, bool]:
        """States after the first layers that may be better than the best, and whether none of them was left out."""
        some, all_seen = Some(self.rank.start, np.empty((1, 0), dtype=np.int16)), True
        for layer in range(layers):
            states = self.rank.choose(some.states, layer)
            count = len(self.rank.layers[layer].names)
            left, seen = self._few(states, layer + 1, limit, best, width)
            before, choices = left // count, (left % count).astype(np.int16)
            some = Some(states[left], np.column_stack([some.choices[before], choices]))
            all_seen &= seen
        return some, all_seen

    def _by_stages(self, limit: int, best: Found | None) -> Found | None:
        """As `within`, knowing a solution that may not be the best."""
        self._stages = self._stages or [
            Search(self.rank.beginning_with(stage)) for stage in range(len(self.rank.stages))
        ]
        parts = [search._alone(limit, best) for search in self._stages]
        for width in (MORE, None):
            some, layer, all_seen = parts[0], 0, True
            for part, more in enumerate(parts):
                layer += more.choices.shape[1]
                if part:
                    some = self._join(some, more, layer, limit, best)
                    left, seen = self._few(some.states, layer, limit, best, width)
                    some, all_seen = some.those(left), all_seen and seen
            best = _best(some) or best
            if all_seen:
                break
            parts = [search._still(part, limit, best) for search, part in zip(self._stages, parts, strict=True)]
        return best

    def _alone(self, limit: int, best: Found | None) -> Some:
        """All states of the first stage that may be better than the best."""
        self._bounds.weigh(limit)
        return self._pass(limit, best, None, self.rank.stage_of.count(self.rank.stage_of[0]))[0]

    def _still(self, some: Some, limit: int, best: Found | None) -> Some:
        """Those states of the first stage that still may be."""
        return some.those(self._bound(some.states, some.choices.shape[1], limit, best)[0])

    def _join(self, some: Some, more: Some, layer: int, limit: int, best: Found | None) -> Some:
        """Those of all pairs of states of different layers that may be better than the best."""
        found = [Some(some.states[:0], np.empty((0, layer), dtype=np.int16))]
        size = max(AT_ONCE // max(len(more.states), 1), 1)
        for start in range(0, len(some.states), size):
            first = some.those(np.arange(start, min(start + size, len(some.states))))
            states = (first.states[:, None] + (more.states - self.rank.start)).reshape(-1, some.states.shape[1])
            left = self._bound(states, layer, limit, best)[0]
            a, b = np.divmod(left, len(more.states))
            found.append(Some(states[left], np.column_stack([first.choices[a], more.choices[b]])))
        return Some(*(np.concatenate(of) for of in zip(*found, strict=True)))

    def _few(
        self, states: Ints, layer: int, limit: int, best: Found | None, width: int | None
    ) -> tuple[NDArray[np.intp], bool]:
        """Those states that may be better than the best and that no other is as good as, and whether they are all."""
        left, bound, peak = self._bound(states, layer, limit, best)
        if layer == len(self.rank.layers):
            return left[_first(bound, peak, 1)], True
        some = _first(bound, peak, None if width is None else 8 * width)
        good = some[least(states[left[some]])]
        few = good[_first(bound[good], peak[good], width)]
        return left[few], len(some) == len(left) and len(few) == len(good)

    def _bound(
        self, states: Ints, layer: int, limit: int, best: Found | None
    ) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Those states that may lead to a better solution than the best, and what time and peak are then at least."""
        most = np.inf if best is None else best.time
        (left,) = np.nonzero(states[:, TIME] + self._bounds.about(states, layer, limit) <= min(most, 2.0**62))
        states, time = states[left], states[left, TIME]
        chosen = self._bounds.chosen(states, layer)
        bound, peak = time + self._bounds.times_after(chosen, layer, limit), self._bounds.peaks(chosen, layer)
        better = bound < most
        if best is not None:
            (equal,) = np.nonzero(bound == most)
            better[equal] = time[equal] + self._bounds.times_after(chosen[:, equal], layer, best.peak - 1) <= most
        return left[better], bound[better], peak[better]


def _first(bound: Floats, peak: Floats, count: int | None) -> NDArray[np.intp]:
    """The places of so many of the least bounds, ascending."""
    if count is None or len(bound) <= count:
        return np.arange(len(bound))
    return np.sort(np.lexsort((peak, bound))[:count])


def _best(some: Some) -> Found | None:
    """Of states that are over, of which there is one at most."""
    for states, choices in zip(*some, strict=True):
        return Found(int(states[TIME]), int(states[MOMENTS:].max()), tuple(choices.tolist()))
    return None
