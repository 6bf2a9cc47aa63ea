"""The least time that layers without a save set yet can take, such that a moment's bytes stay within a limit.

Bytes of a moment are a sum over the layers, once it is said which layer its action is at (a *row*): what is alive is
the largest over its rows. Of one row, or of a weighted sum of rows, the least time for so many bytes is found as that
of a knapsack whose last thing may be taken in part (Dantzig 1957; where one of each class is taken, Sinha & Zoltners
1979): the steps along the lower hull of every layer's choices, the best first. Weights for the sum come from the linear
program over all rows (its dual); whatever they are, the bound is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from engine.recompute.choices import DEFERRED, KEPT, MOMENTS, OWN, Choices, Floats, Ints, Rank
from engine.recompute.moments import W


class Row:
    """A moment with its action at one layer of the stage.

    Attributes:
        bytes_of: what each choice of each layer adds.
    """

    def __init__(self, rank: Rank, place: int, layer: int) -> None:
        self.place, self.moment, self.layer = place, rank.moments[place], layer
        self.bytes_of = [self._bytes(rank, at).astype(np.float64) for at in range(len(rank.layers))]

    def _bytes(self, rank: Rank, at: int) -> Ints:
        of, stage, moment = rank.layers[at], rank.stage_of[at], self.moment
        alive = moment.live[stage] * of.kept + moment.deferred[stage] * of.deferred
        return alive + self._own(of, at) if stage == moment.stage else alive

    def _own(self, of: Choices, at: int) -> Ints:
        return of.own(self.moment) if at == self.layer else of.beside(self.moment, before=at < self.layer)

    def of_chosen(self, rank: Rank, states: Ints, layer: int) -> Floats:
        """Bytes of the layers before one, and of what is on its way, by state."""
        alive = states[:, MOMENTS + self.place]
        stage = rank.begun(layer)
        if stage is None:
            return alive.astype(np.float64)
        alive = alive + self.moment.live[stage] * states[:, KEPT] + self.moment.deferred[stage] * states[:, DEFERRED]
        if stage == self.moment.stage:
            if layer > self.layer:
                alive += states[:, OWN[self.moment.kind]]
            else:
                alive += states[:, DEFERRED if self.moment.kind is W else KEPT]
        return alive.astype(np.float64)


def rows(rank: Rank) -> list[Row]:
    """Of each moment those at the ends of runs of equal layers: few, and rarely is another the largest."""
    found = list[Row]()
    for place, moment in enumerate(rank.moments):
        ends = sorted({end for run in rank.runs(moment.stage) for end in run})
        found += [Row(rank, place, layer) for layer in ends]
    return found


class Knapsack:
    """Least time of the layers from any one on, over what they may add to a row (or a sum of rows).

    Attributes:
        least: bytes that the layers from each one on add at least.

    Args:
        bytes_of, times: of each choice of each layer.
    """

    def __init__(self, bytes_of: Sequence[Floats], times: Sequence[Floats]) -> None:
        known = dict[bytes, list[tuple[float, float]]]()
        hulls = list[list[tuple[float, float]]]()
        for size, time in zip(bytes_of, times, strict=True):
            key = size.tobytes() + time.tobytes()
            known[key] = known.get(key) or _hull(size, time)
            hulls.append(known[key])
        steps = [(layer, x - x0, y - y0) for layer, hull in enumerate(hulls) for (x0, y0), (x, y) in pairwise(hull)]
        steps.sort(key=lambda step: step[2] / step[1])
        layer_of, more, faster = np.array(steps, dtype=np.float64).reshape(-1, 3).T
        to_come = np.append(0.0, layer_of) >= np.arange(len(hulls) + 1)[:, None]
        self._bytes = np.cumsum(to_come * np.append(0.0, more), axis=1)
        self._times = np.cumsum(to_come * np.append(0.0, faster), axis=1)
        self.least, self._slowest = (
            np.append(np.cumsum([hull[0][axis] for hull in reversed(hulls)])[::-1], 0.0) for axis in (0, 1)
        )

    def time(self, layer: int, room: Floats) -> Floats:
        """Of the layers from one on, that may add so much; infinite where they cannot."""
        room = room - self.least[layer]
        time = self._slowest[layer] + np.interp(room, self._bytes[layer], self._times[layer])
        return np.where(room < 0, np.inf, time)


class Bounds:
    """What states will take at least, and what their peaks will be at least.

    Attributes:
        rows: of the rank.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.rows = rank, rows(rank)
        self.times = [of.time.astype(np.float64) for of in rank.layers]
        self.knapsacks = [Knapsack(row.bytes_of, self.times) for row in self.rows]
        self._sum = list[tuple[float, Row]]()
        self._knapsack: Knapsack | None = None
        self._rounding = 1e-3 + 1e-12 * sum(time.max() for time in self.times)

    def weigh(self, limit: int) -> None:
        """Find the sum of rows that says most, for a limit, where nothing is chosen yet."""
        found = dict[bytes, tuple[int, Floats, Floats]]()
        for at, times in enumerate(self.times):
            block = np.array([row.bytes_of[at] for row in self.rows])
            key = block.tobytes() + times.tobytes()
            found[key] = found.get(key, (0,))[0] + 1, block, times
        weights = _weights(list(found.values()), [limit - row.moment.held for row in self.rows])
        self._sum = [(weight, row) for weight, row in zip(weights, self.rows, strict=True) if weight]
        sums = [
            np.sum([weight * row.bytes_of[at] for weight, row in self._sum], axis=0) for at in range(len(self.times))
        ]
        self._knapsack = Knapsack(sums, self.times) if self._sum else None

    def about(self, states: Ints, layer: int, limit: float) -> Floats:
        """Ticks of the layers from one on, at least, by that sum of rows alone."""
        if self._knapsack is None:
            return np.zeros(len(states))
        chosen = np.sum([weight * row.of_chosen(self.rank, states, layer) for weight, row in self._sum], axis=0)
        return self._whole(self._knapsack.time(layer, limit * (1 + 1e-12) - chosen))

    def chosen(self, states: Ints, layer: int) -> Floats:
        """[rows, states]: bytes of each row, of the layers before one."""
        return np.array([row.of_chosen(self.rank, states, layer) for row in self.rows])

    def peaks(self, chosen: Floats, layer: int) -> Floats:
        """What the peaks will be at least."""
        return (chosen + np.array([[k.least[layer]] for k in self.knapsacks])).max(axis=0)

    def times_after(self, chosen: Floats, layer: int, limit: float) -> Floats:
        """Ticks of the layers from one on, at least, such that the peak stays within a limit."""
        return self._whole(
            np.max([k.time(layer, limit - of) for k, of in zip(self.knapsacks, chosen, strict=True)], axis=0)
        )

    def _whole(self, times: Floats) -> Floats:
        """Least whole numbers of ticks, with what rounding may have added."""
        return np.ceil(times - self._rounding)


def _weights(blocks: Sequence[tuple[int, Floats, Floats]], room: Sequence[int]) -> Floats:
    """Of the rows, by the linear program: the least time with so much room, or the least peak where nothing takes time.

    Args:
        blocks: of equal layers: how many, the bytes [rows, choices] and the time of each choice. room: of each row.
    """
    from scipy.optimize import linprog  # half a second, of which a rank that chooses nothing has no use

    time, bytes_of = np.concatenate([of for *_, of in blocks]), np.concatenate([of for _, of, _ in blocks], axis=1)
    of_each = np.repeat(np.eye(len(blocks)), [len(of) for *_, of in blocks], axis=1)
    lowers_peak = float(not time.any())
    most = max(room)
    unit = max(bytes_of.max() if lowers_peak else most, 1)
    found = linprog(
        np.append(time / max(time.max(), 1), lowers_peak),
        A_ub=np.column_stack([bytes_of / unit, np.full(len(bytes_of), -lowers_peak)]),
        b_ub=(np.array(room, dtype=np.float64) - lowers_peak * most) / unit,
        A_eq=np.column_stack([of_each, np.zeros(len(blocks))]),
        b_eq=np.array([count for count, *_ in blocks]),
    )
    weights = np.zeros(len(bytes_of)) if found.status else np.maximum(-found.ineqlin.marginals, 0)
    return weights / max(weights.sum(), 1e-300)


def _hull(bytes_of: Floats, times: Floats) -> list[tuple[float, float]]:
    """The lower hull of (bytes, time), from the least bytes to the least time."""
    hull = list[tuple[float, float]]()
    for x, y in sorted(zip(bytes_of.tolist(), times.tolist(), strict=True)):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b is on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
