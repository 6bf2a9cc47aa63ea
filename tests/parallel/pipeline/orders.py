"""Compute orders by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

from parallel.pipeline import Action, Schedule
from parallel.pipeline.graph import data_dependencies


def in_any_order(
    draw: random.Random, name: str, rows: Sequence[Sequence[Action]], placement: Sequence[int], num_micro_batches: int
) -> Schedule:
    """All actions in one order that dependencies allow, each on the rank of its stage.

    Args:
        rows: of actions, in each of which one comes after the other.
    """
    waiting = [list(row) for row in rows]
    there_are = {action for row in rows for action in row}
    programs: list[list[Action]] = [[] for _ in range(max(placement) + 1)]

    def schedule() -> Schedule:
        return Schedule(
            name=name,
            num_stages=len(placement),
            num_micro_batches=num_micro_batches,
            stage_to_rank=tuple(placement),
            ranks=tuple(map(tuple, programs)),
        )

    empty, done = schedule(), set[Action]()
    while any(waiting):
        ready = [row for row in waiting if row and done.issuperset(data_dependencies(row[0], empty, there_are))]
        action = draw.choice(ready).pop(0)
        done.add(action)
        programs[placement[action.stage]].append(action)
    return schedule()
