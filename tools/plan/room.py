"""The least that a layout's ranks compute again within a budget, by arithmetic: a bound of what the solver finds.

Of a rank, at the moment when most micro-batches are alive, blocks may keep so many bytes as weights, states and buffers
leave. Which of their outputs go is a knapsack whose last thing is taken in part, as in `engine.recompute.bounds`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from parallel.pipeline.actions import Action, ActionKind


@dataclass(frozen=True, kw_only=True)
class Kept:
    """By one save set, of a block and a micro-batch: bytes that stay, those that a split backward leaves for its second
    half, the most while its backward runs, and seconds that are computed again.
    """

    kept: float
    deferred: float
    backward: float
    again: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """One of a rank: of all micro-batches alive at that moment, bytes that it may keep, and the seconds of each that it
    then computes again.
    """

    choices: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Of a rank: micro-batches of each stage between forward and backward, and between the halves of a split one, when
    there are most; and the stage whose backward comes then.
    """

    alive: dict[int, int]
    deferred: dict[int, int]
    backward: int


def fullest(program: Sequence[Action]) -> Moment:
    """The moment of a rank's program when most micro-batches are alive."""
    alive, deferred = Counter[int](), Counter[int]()
    found, most = Moment(alive={}, deferred={}, backward=0), 0
    for action in program:
        match action.kind:
            case ActionKind.FORWARD:
                alive[action.stage] += 1
            case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT:
                if (count := alive.total() + deferred.total()) > most:
                    found, most = Moment(alive=dict(alive), deferred=dict(deferred), backward=action.stage), count
                alive[action.stage] -= 1
                deferred[action.stage] += action.kind is ActionKind.BACKWARD_INPUT
            case ActionKind.BACKWARD_WEIGHT:
                deferred[action.stage] -= 1
    return found


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the blocks of a rank may keep at that moment. `own`: bytes that the backward which comes then adds."""

    blocks: Sequence[Block]
    own: float

    def least_again(self, room: float) -> tuple[float, float]:
        """(seconds of a micro-batch that blocks compute again at least, bytes that there is too little room for)."""
        bytes_now, seconds = self._least
        left = room - self.own - bytes_now
        if left < 0:
            return seconds, -left
        for _, more, faster in self._steps:
            share = min(1.0, left / more)
            seconds, left = seconds + share * faster, left - share * more
            if left <= 0:
                break
        return max(0.0, seconds), 0.0

    @cached_property
    def _hulls(self) -> list[list[tuple[float, float]]]:
        hulls = {block: _hull(block.choices) for block in set(self.blocks)}
        return [hulls[block] for block in self.blocks]

    @cached_property
    def _least(self) -> tuple[float, float]:
        """Bytes at least, and the seconds that are computed again with these."""
        return sum(hull[0][0] for hull in self._hulls), sum(hull[0][1] for hull in self._hulls)

    @cached_property
    def _steps(self) -> list[tuple[float, float, float]]:
        """(seconds per byte, bytes, seconds) that may be added, the best first."""
        return sorted(
            ((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0], b[1] - a[1]) for hull in self._hulls for a, b in pairwise(hull)
        )


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower left hull: more bytes, less time, ever more bytes for it."""
    hull = list[tuple[float, float]]()
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
