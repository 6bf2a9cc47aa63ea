"""What the times of runs say of a difference, and how surely.

Student's t gives the bounds. Of a layout the variance is half its own and half that of all layouts (as in limma, Smyth
2004, with the weights fixed). Over all layouts the *rounds* are what varies: what disturbs the machine for a while
disturbs several layouts, which are no independent witnesses then. Half of LEVEL goes to that mean, the other half is
shared out over the layouts (Bonferroni).

What else differs between two sweeps at different times, for all their rounds, shows in neither of them: no bounds
cover it (compare.py's tolerance).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05
ALL = "all together"

Values = Mapping[int, float]
"""A value of each round."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a layout: logarithms of times, new less old.

    Attributes:
        sides: values of each round: differences, where rounds are compared with each other; else of the old sweep, and
            of the new.
    """

    sides: tuple[Values, ...]

    @property
    def mean(self) -> float:
        """What is estimated."""
        *old, new = (statistics.fmean(side.values()) for side in self.sides)
        return new - sum(old)

    @property
    def squares(self) -> float:
        """Sum of squared deviations from each side's mean."""
        means = [statistics.fmean(side.values()) for side in self.sides]
        return sum((value - mean) ** 2 for side, mean in zip(self.sides, means, strict=True) for value in side.values())

    @property
    def freedom(self) -> int:
        """How many deviations are free."""
        return sum(len(side) - 1 for side in self.sides)

    @property
    def weight(self) -> float:
        """Variance of the mean over that of one value."""
        return sum(1 / len(side) for side in self.sides)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Time of the new program over that of the old: the estimate, and where it may lie."""

    ratio: float
    low: float
    high: float


def of_pairs(pairs: Values) -> Difference | None:
    """Of differences in a round each; None of fewer than two."""
    return _of(pairs)


def of_sweeps(old: Values, new: Values) -> Difference | None:
    """Of all runs of each side; None of fewer than two."""
    return _of(old, new)


def _of(*sides: Values) -> Difference | None:
    return Difference(sides=sides) if min(map(len, sides)) > 1 else None


def bounds_of(differences: Mapping[str, Difference]) -> dict[str, Bounds]:
    """For each layout, and for ALL of several, at a level that holds for all of these together on each side."""
    from scipy.stats import t  # takes a second

    def bounds(mean: float, variance: float, freedom: int, level: float) -> Bounds:
        half = float(t.ppf(1 - level, freedom)) * math.sqrt(variance)
        return Bounds(ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))

    total = sum(one.freedom for one in differences.values())
    common = sum(one.squares for one in differences.values()) / total
    count = len(differences)
    level = LEVEL if count == 1 else LEVEL / 2 / count
    found = {}
    for name, one in differences.items():
        variance = (one.squares + one.freedom * common) / (2 * one.freedom)
        found[name] = bounds(one.mean, variance * one.weight, min(2 * one.freedom, total), level)
    if (together := _together(list(differences.values()))) is not None:
        variance = together.squares / together.freedom
        found[ALL] = bounds(together.mean, variance * together.weight, together.freedom, LEVEL / 2)
    return found


def _together(differences: Sequence[Difference]) -> Difference | None:
    """Of the mean over several layouts, in each round that all of them have."""
    sides = []
    for values in zip(*(one.sides for one in differences), strict=True):
        rounds = set.intersection(*(set(one) for one in values))
        sides.append({i: statistics.fmean(one[i] for one in values) for i in sorted(rounds)})
    return _of(*sides) if len(differences) > 1 else None
