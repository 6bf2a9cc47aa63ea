"""Which blocks of a student are matched with which of a teacher's (`distillation.pairs`)."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import ceil

from engine.config.distillation import DistillationConfig
from engine.errors import ConfigError


def pairs_of(keys: DistillationConfig, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Blocks to be matched of models of so many.

    Raises:
        ConfigError: there are no such blocks, or not in this order.
    """
    given = f"even:{min(4, student, teacher)}" if keys.pairs is None else keys.pairs
    if isinstance(given, str):
        what, _, count = given.partition(":")
        if what != "even" or not count.isdecimal() or not 1 <= int(count) <= min(student, teacher):
            raise ConfigError(
                f"distillation.pairs is {given}: give even:1 to even:{min(student, teacher)}, as the student has "
                f"{student} blocks and the teacher {teacher}, or a list of pairs such as [[0, 0]]"
            )
        spread = [Fraction(n + 1, int(count)) for n in range(int(count))]
        return tuple((ceil(at * student) - 1, ceil(at * teacher) - 1) for at in spread)
    for pair in given:
        for number, depth, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            if not 0 <= number < depth:
                raise ConfigError(
                    f"distillation.pairs has {list(pair)}, but the {whose} has no block {number}: it has blocks 0 "
                    f"to {depth - 1}"
                )
    for one, next_one in pairwise(given):
        if not (one[0] < next_one[0] and one[1] < next_one[1]):
            raise ConfigError(
                f"distillation.pairs has {list(one)} before {list(next_one)}: pairs must rise in both, since both "
                "models run once, side by side"
            )
    if not given:
        raise ConfigError("distillation.pairs is an empty list: give a pair, or leave it out")
    return tuple((i, j) for i, j in given)
