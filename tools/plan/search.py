"""The best layouts, found without looking at each: what is least by a bound is looked at more closely first.

A group of layouts has a lower bound of their time. The group with the least is split into smaller ones with higher
bounds, down to single layouts whose time is known with their save sets. So what comes out first is the best there is,
and a layout that never comes out takes no less time than those that did. Bounds: `tools.plan.bounds`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from tools.plan.bounds import Misfit
from tools.plan.evaluate import Evaluator, Prediction
from tools.plan.layouts import Key, Layout, Space

_SLACK = 1e-9  # rounding of bounds


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has found.

    Attributes:
        best: of each arrangement of ranks (pipeline x data x context x tensor) the best layout, quickest first.
        misfits: that would have been quicker than the last of these, but do not fit. looked_at: layouts that there are.
        counts: of those, what became of them.
    """

    best: tuple[Prediction, ...]
    misfits: tuple[Misfit, ...]
    looked_at: int
    counts: dict[str, int]


@dataclass(order=True)
class _Entry:
    """Of the heap: a group of layouts (or one with its time)."""

    bound: float
    order: int
    size: int = field(compare=False)
    grid: tuple[int, int, int, int] | None = field(compare=False)
    split: Callable[[], Iterator[_Entry]] | Prediction = field(compare=False)


class Search:
    """Of a space, as far as asked.

    Args:
        budget: bytes that a rank may take; None: as the configuration says.
    """

    def __init__(self, space: Space, evaluator: Evaluator, budget: int | None = None) -> None:
        self.space, self.evaluator, self.budget = space, evaluator, budget or evaluator.budget
        self.counts = {"slower": 0, "too large": 0, "planned": 0, "misfits": 0}
        self.misfits: list[Misfit] = []
        self._number = count()
        self._heap = list(self._families())
        heapq.heapify(self._heap)

    def best(self, most: int) -> Found:
        """Of so many arrangements of ranks."""
        found = dict[tuple[int, int, int, int], Prediction]()
        while self._heap and len(found) < most:
            entry = heapq.heappop(self._heap)
            if entry.grid in found:
                self.counts["slower"] += entry.size
            elif isinstance(entry.split, Prediction):
                found[entry.split.layout.grid] = entry.split
            else:
                for part in entry.split():
                    heapq.heappush(self._heap, part)
        self.counts["slower"] += sum(entry.size for entry in self._heap)
        return Found(
            best=tuple(found.values()), misfits=tuple(self.misfits), looked_at=self.space.count(), counts=self.counts
        )

    # -- groups -------------------------------------------------------------------------------------------------------

    def _entry(
        self, bound: float, size: int, split: Callable[[], Iterator[_Entry]] | Prediction,
        grid: tuple[int, int, int, int] | None = None,
    ) -> _Entry:  # fmt: skip
        return _Entry(bound * (1 - _SLACK), next(self._number), size, grid, split)

    def _families(self) -> Iterator[_Entry]:
        """All layouts of a key."""
        for key in self.space.families():
            sizes = sorted({b for _, d in self.space.pipelines(key) for b in self.space.micro_batches(key, d)})
            if sizes:
                members = sum(len(list(self._layouts(key, b))) for b in sizes)
                bound = self.evaluator.least_of(key, sizes[-1])
                yield self._entry(bound, members, lambda key=key, sizes=sizes: self._sizes(key, sizes))  # type: ignore[misc]

    def _sizes(self, key: Key, sizes: list[int]) -> Iterator[_Entry]:
        """All of a key and a size of micro-batches."""
        for size in sizes:
            members = len(list(self._layouts(key, size)))
            bound = self.evaluator.least_work(key, size)
            yield self._entry(bound, members, lambda size=size: self._schedules(key, size))  # type: ignore[misc]

    def _schedules(self, key: Key, size: int) -> Iterator[_Entry]:
        """All of a key, a size, a pipeline and a schedule."""
        groups = dict[tuple[int, str, int | None], list[Layout]]()
        for layout in self._layouts(key, size):
            groups.setdefault((layout.pipeline, layout.schedule, layout.virtual), []).append(layout)
        for group in groups.values():
            bound = self.evaluator.least_busy(group[0])
            yield self._entry(bound, len(group), lambda group=group: self._singles(group), group[0].grid)  # type: ignore[misc]

    def _singles(self, group: list[Layout]) -> Iterator[_Entry]:
        """One layout each, with what it computes again at least, if it might fit."""
        for layout in group:
            again = self._fitting(self.evaluator.least_again(layout, self.budget, closely=False))
            if again is not None:
                yield self._entry(again, 1, lambda layout=layout, b=again: self._simulated(layout, b), layout.grid)  # type: ignore[misc]

    def _simulated(self, layout: Layout, bound: float) -> Iterator[_Entry]:
        """With its states as they are allocated, and by its schedule."""
        again = self._fitting(self.evaluator.least_again(layout, self.budget, closely=True))
        if again is not None:
            bound = max(bound, again, self.evaluator.least(layout))
            yield self._entry(bound, 1, lambda: self._solved(layout), layout.grid)

    def _fitting(self, found: float | Misfit) -> float | None:
        """A bound of a layout's time, if it may fit."""
        if not isinstance(found, Misfit):
            return found
        self.counts["too large"] += 1
        self.misfits.append(found)
        return None

    def _solved(self, layout: Layout) -> Iterator[_Entry]:
        """With its save sets."""
        found = self.evaluator.exactly(layout, self.budget)
        if isinstance(found, Misfit):
            self.counts["misfits"] += 1
            self.misfits.append(found)
            return
        self.counts["planned"] += 1
        yield self._entry(found.seconds, 0, found, layout.grid)

    def _layouts(self, key: Key, size: int) -> Iterator[Layout]:
        for pipeline, data in self.space.pipelines(key):
            if size not in self.space.micro_batches(key, data):
                continue
            for schedule, virtual in self.space.schedules(pipeline):
                for zero in self.space.zeros(key, data):
                    yield Layout(
                        tensor=key.tensor, sequence=key.sequence, context=key.context, pipeline=pipeline,
                        schedule=schedule, virtual=virtual, data=data, zero=zero, micro_batch=size,
                    )  # fmt: skip
