"""Fewer cases of many factors: all pairs of settings instead of all combinations (covering arrays of strength 2).

Faults that take three settings to show are rare (Kuhn, Wallace, Gallo, "Software Fault Interactions and Implications
for Software Testing", 2004); all pairs of k factors of n settings fit into some n^2 cases, all combinations are n^k.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import combinations
from typing import TypeVar

_T = TypeVar("_T")
Pair = tuple[tuple[str, Hashable], ...]


def pairs(*cases: Mapping[str, Hashable]) -> set[Pair]:
    """Each two of a case's factors, with their values; of several cases all that occur."""
    return {pair for case in cases for pair in combinations(sorted(case.items(), key=lambda item: item[0]), 2)}


def covering(cases: Iterable[_T], settings: Callable[[_T], Mapping[str, Hashable]]) -> list[_T]:
    """Some of the cases, in their order, in which each pair of settings occurs that occurs in all of them.

    Greedy: time and again the case, the first of equals, with the most pairs that none before it has.

    Args:
        settings: the factors of a case, by name; those that mean nothing for it left out.
    """
    left = {number: (case, pairs(settings(case))) for number, case in enumerate(cases)}
    missing = set[Pair]().union(*(found for _, found in left.values()))
    chosen: dict[int, _T] = {}
    while missing:
        best = max(left, key=lambda number: len(left[number][1] & missing))
        chosen[best], found = left.pop(best)
        missing -= found
    return [chosen[number] for number in sorted(chosen)]
