"""The least that a layout's ranks compute again within a budget, by arithmetic: a bound of what the solver finds.

Of a rank, at the moment when most micro-batches are alive, blocks may keep so many bytes as weights, states and buffers
leave. Which of their outputs go is a knapsack whose last thing is taken in part, as in `engine.recompute.bounds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from parallel.pipeline.actions import Action, ActionKind

BACKWARDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One of a rank: micro-batches of it that are alive at that moment; of a micro-batch, bytes that it may keep and
    the seconds that it then computes again.
    """

    alive: int
    choices: Sequence[tuple[float, float]]


def fullest(program: Sequence[Action]) -> dict[int, int]:
    """Micro-batches alive of each stage of a rank when there are most of them."""
    now, most = dict[int, int](), dict[int, int]()
    for action in program:
        if action.kind is ActionKind.FORWARD:
            now[action.stage] = now.get(action.stage, 0) + 1
            if sum(now.values()) > sum(most.values()):
                most = dict(now)
        elif action.kind in BACKWARDS:
            now[action.stage] -= 1
    return most


def least_again(blocks: Sequence[Block], room: float) -> tuple[float, float]:
    """(seconds of a micro-batch that blocks compute again at least, bytes that there is too little room for)."""
    steps, bytes_now, seconds = list[tuple[float, float, float]](), 0.0, 0.0

    for block in blocks:
        hull = _hull([(block.alive * kept, again) for kept, again in block.choices])
        bytes_now += hull[0][0]
        seconds += hull[0][1]
        steps += [((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]
    left = room - bytes_now
    if left < 0:
        return seconds, -left
    for _, more, faster in sorted(steps):
        share = min(1.0, left / more)
        seconds, left = seconds + share * faster, left - share * more
        if left <= 0:
            break
    return max(0.0, seconds), 0.0


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
