"""The layers of a rank with the save sets to choose from, as arrays, and what is alive after choices for the first few.

A *state* is a row of numbers about save sets chosen for the first layers of a rank; what they are is in `Rank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.recompute.costs import LayerCost
from engine.recompute.moments import B, F, I, Moment, W

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TICKS = 10**12
"""Seconds are counted in whole picoseconds, so that sums of them are exact."""

TIME, KEPT, DEFERRED, FORWARD, BACKWARD, INPUT, WEIGHT, MOMENTS = range(8)
"""Columns of a state: time so far; of the stage that is begun: what it keeps, what it defers, and what its F, B, I and
W hold at most; then, of each moment, what is on its way and what is alive of the stages that are over."""

OWN = {F: FORWARD, B: BACKWARD, I: INPUT, W: WEIGHT}


class Choices:
    """The save sets of a layer, least kept first; without those that another is as good as in all respects.

    Attributes:
        names: of the save sets. kept, forward, backward, deferred, weight, held, time: of each, see LayerCost.

    Args:
        passes: how often a step recomputes what is dropped.

    Raises:
        ValueError: there is none, or a number is negative.
    """

    def __init__(self, costs: Mapping[str, LayerCost], passes: int) -> None:
        rows = {
            name: (c.kept, c.forward, c.backward, c.deferred, c.weight, c.held, round(c.seconds * TICKS) * passes)
            for name, c in costs.items()
        }
        wrong = [name for name, row in rows.items() if min(row) < 0]
        if not rows or wrong:
            raise ValueError(f"a layer has no save set to choose, or one that costs less than nothing: {wrong}")
        kept = dict[str, tuple[int, ...]]()
        for name, row in sorted(rows.items(), key=lambda item: item[1]):  # stable: the first named of equal ones
            if not any(all(a <= b for a, b in zip(other, row, strict=True)) for other in kept.values()):
                kept[name] = row
        self.names = tuple(kept)
        columns = np.array(list(kept.values()), dtype=np.int64).T
        self.kept, self.forward, self.backward, self.deferred, self.weight, self.held, self.time = columns

    def own(self, moment: Moment) -> Ints:
        """What each holds while an action of that moment's kind goes through the layer."""
        return {F: self.forward, W: self.weight + self.deferred}.get(moment.kind, self.backward)

    def beside(self, moment: Moment, *, before: bool) -> Ints:
        """What it holds while that is at another layer, which this one is before or behind."""
        if before:
            return self.deferred if moment.kind is W else self.kept
        return {B: self.held, I: self.held + self.deferred}.get(moment.kind, np.zeros_like(self.kept))


def choices_of(stages: Sequence[Sequence[Mapping[str, LayerCost]]], passes: Sequence[int]) -> list[list[Choices]]:
    """Of each layer of each stage; the same object for layers with equal costs.

    Args:
        passes: of each stage, see `Choices`.

    Raises:
        ValueError: as `Choices`.
    """
    found = dict[tuple[int, frozenset[tuple[str, LayerCost]]], Choices]()

    def of(costs: Mapping[str, LayerCost], times: int) -> Choices:
        key = times, frozenset(costs.items())
        found[key] = found.get(key) or Choices(costs, times)
        return found[key]

    return [[of(costs, times) for costs in layers] for layers, times in zip(stages, passes, strict=True)]


class Rank:
    """The layers of a rank, all its stages one after the other, and its moments.

    Attributes:
        stages: what there is to choose, layer by layer. layers: of all stages. stage_of: of each of them.

    Args:
        order: that the stages are gone through in; ascending as a rule. Equal layers are the same object.
    """

    def __init__(
        self, stages: Sequence[Sequence[Choices]], at: Sequence[Moment], order: Sequence[int] | None = None
    ) -> None:
        order = range(len(stages)) if order is None else order
        self.stages, self.moments = stages, at
        self.layers = [layer for stage in order for layer in stages[stage]]
        self.stage_of = [stage for stage in order for _ in stages[stage]]
        self.live = np.array([m.live for m in at], dtype=np.int64)
        self.deferred = np.array([m.deferred for m in at], dtype=np.int64)

    def beginning_with(self, stage: int) -> Rank:
        """The same with one stage before all others."""
        return Rank(self.stages, self.moments, sorted(range(len(self.stages)), key=lambda other: other != stage))

    @property
    def start(self) -> Ints:
        """The one state where nothing is chosen."""
        return np.array([[0] * MOMENTS + [moment.held for moment in self.moments]], dtype=np.int64)

    def runs(self, stage: int) -> Iterator[tuple[int, int]]:
        """The first and the last layer of each run of equal layers in a stage."""
        own = [layer for layer, of in enumerate(self.stage_of) if of == stage]
        starts = [l for l in own if l == own[0] or self.layers[l] is not self.layers[l - 1]]
        yield from zip(starts, [*(start - 1 for start in starts[1:]), *own[-1:]], strict=True)

    def begun(self, layer: int) -> int | None:
        """The stage that is begun and not over before a layer."""
        inside = 0 < layer < len(self.layers) and self.stage_of[layer - 1] == self.stage_of[layer]
        return self.stage_of[layer] if inside else None

    def choose(self, states: Ints, layer: int) -> Ints:
        """States after each choice for a layer, after each state before it: [states, choices] in one dim."""
        of, (count, _) = self.layers[layer], states.shape
        new = np.repeat(states, len(of.names), axis=0)
        kept, forward, backward, deferred, weight, held, time = (
            np.tile(x, count) for x in (of.kept, of.forward, of.backward, of.deferred, of.weight, of.held, of.time)
        )
        before = new[:, KEPT].copy()
        new[:, FORWARD] = np.maximum(new[:, FORWARD], before + forward)
        new[:, BACKWARD] = np.maximum(new[:, BACKWARD] + held, before + backward)
        new[:, INPUT] = np.maximum(new[:, INPUT] + held + deferred, before + backward)
        new[:, WEIGHT] = np.maximum(new[:, WEIGHT], new[:, DEFERRED] + deferred + weight)
        for column, more in ((TIME, time), (KEPT, kept), (DEFERRED, deferred)):
            new[:, column] += more
        self._forget(new, layer)
        return new

    def _forget(self, states: Ints, layer: int) -> None:
        """What no moment asks for, and all of a stage that is over but what its moments hold."""
        stage = self.stage_of[layer]
        if self.begun(layer + 1) is None:
            states[:, MOMENTS:] += np.outer(states[:, KEPT], self.live[:, stage])
            states[:, MOMENTS:] += np.outer(states[:, DEFERRED], self.deferred[:, stage])
            for place, moment in enumerate(self.moments):
                if moment.stage == stage:
                    states[:, MOMENTS + place] += states[:, OWN[moment.kind]]
            states[:, KEPT:MOMENTS] = 0
            return
        asked = {OWN[m.kind] for m in self.moments if m.stage == stage}
        asked |= {DEFERRED} if WEIGHT in asked or self.deferred[:, stage].any() else set()
        states[:, [c for c in range(DEFERRED, MOMENTS) if c not in asked]] = 0


def least(rows: Ints) -> NDArray[np.intp]:
    """Those rows that no other row is as small as in every column, ascending; of equal ones the first."""
    if len(rows):
        rows = rows[:, np.ptp(rows, axis=0) > 0]
    if not rows.size:
        return np.arange(min(len(rows), 1))
    order = np.lexsort(rows.T[::-1])  # what is smaller than a row stands before it; stable
    rows = rows[order]
    new = np.append(True, (rows[1:] != rows[:-1]).any(axis=1))
    rows, order = rows[new], order[new]
    if rows.shape[1] <= 2:
        lowest = np.minimum.accumulate(rows[:, -1])
        return np.sort(order[np.append(True, rows[1:, -1] < lowest[:-1])])
    return np.sort(order[_least_of_sorted(rows)])


def _least_of_sorted(rows: Ints, size: int = 128) -> NDArray[np.intp]:
    """As `least`, of rows that are sorted and all different: a block at a time against what is left before it."""
    columns = [np.ascontiguousarray(column) for column in rows.T[1:]]
    left = np.empty(0, dtype=np.intp)
    for start in range(0, len(rows), size):
        block = np.arange(start, min(start + size, len(rows)))
        for others in (left, block):
            if len(others):
                beaten = others[None] < block[:, None]
                for column in columns:
                    beaten &= column[others][None] <= column[block][:, None]
                block = block[~beaten.any(axis=1)]
        left = np.append(left, block)
    return left
