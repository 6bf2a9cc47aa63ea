"""Which layers go to which stage: contiguous pieces as even as can be, for stages and for ranks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, product


def partition(costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """Cut a list of layers into contiguous, non-empty stages with the least possible largest cost.

    Among all such cuts the one with the least sum of squared stage costs (the most even one) is taken, and among
    those the one with the shortest first stages, since in 1F1B the first ranks keep the most activations. Sums are
    exact, so the result does not hang on rounding.

    Args:
        costs: cost of each layer in any unit, finite and not negative.
        num_stages: pieces to cut, 1 to ``len(costs)``.

    Returns:
        The layer indices of each stage.

    Raises:
        ValueError: no layers, a cost that is negative or not finite, or a number of stages that cannot be.
    """
    _check(costs, num_stages)
    totals = [0, *accumulate(_exact(costs))]
    return _most_even(totals, num_stages, _least_largest(totals, num_stages))


def balance(costs: Sequence[float], stages: Sequence[range], ranks: Sequence[int]) -> tuple[range, ...]:
    """Move layers between stages until ranks that hold several of them have even shares.

    Stages that are as even as can be may leave a rank with all the longer ones, and a step is as long as the rank that
    has most. So layers are moved, one at a time over any number of boundaries, as long as that makes the squares of the
    costs of ranks and stages less in all. That is no optimum, but near one, measured with the simulator: docs/log.md.

    Args:
        costs: of each layer, as for `partition`, which has made `stages`. ranks: that hold them.

    Returns:
        The layer indices of each stage.
    """
    ends = [stage.stop for stage in stages]
    several = len(set(ranks)) < len(ranks)
    while several and (move := _best_move(_exact(costs), ends, ranks)) is not None:
        step, boundaries = move
        for boundary in boundaries:
            ends[boundary] += step
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _best_move(costs: list[int], ends: list[int], ranks: Sequence[int]) -> tuple[int, range] | None:
    """(by how much, which of the ends) to move so that the squares become least, or None where they only grow."""
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    by_stage = [sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    by_rank = [0] * (max(ranks) + 1)
    for cost, rank in zip(by_stage, ranks, strict=True):
        by_rank[rank] += cost
    best, least = None, 0
    last = len(ends) - 2
    for step, origin in product((1, -1), range(last + 1)):
        of_stages, of_ranks, growth = list(by_stage), list(by_rank), 0
        for boundary in range(origin, last + 1) if step > 0 else range(origin, -1, -1):
            giver, taker = (boundary + 1, boundary) if step > 0 else (boundary, boundary + 1)
            cost = costs[ends[boundary] - (step < 0)]
            growth += _shift(of_stages, giver, taker, cost) + _shift(of_ranks, ranks[giver], ranks[taker], cost)
            if sizes[giver] > 1 and growth < least:  # else it must be given one itself
                best, least = (step, range(min(origin, boundary), max(origin, boundary) + 1)), growth
    return best


def _shift(loads: list[int], giver: int, taker: int, cost: int) -> int:
    """Move a cost; by how much the sum of squares grows."""
    if giver == taker:
        return 0
    growth = 2 * cost * (loads[taker] - loads[giver] + cost)
    loads[giver] -= cost
    loads[taker] += cost
    return growth


def _check(costs: Sequence[float], num_stages: int) -> None:
    if len(costs) == 0:
        raise ValueError("no layers to cut into stages: costs is empty, give one cost per layer")
    for layer, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"layer {layer} has cost {cost}: costs must be finite and not negative")
    if not 1 <= num_stages <= len(costs):
        raise ValueError(
            f"cannot cut {len(costs)} layers into {num_stages} stages, since each needs a layer: choose 1 to "
            f"{len(costs)} stages (pipeline size times virtual stages per rank), or a deeper model"
        )


def _exact(costs: Sequence[float]) -> list[int]:
    """The costs times a common factor, as integers without rounding (floats are fractions over powers of two)."""
    fractions = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _least_largest(totals: list[int], num_stages: int) -> int:
    """The least possible largest stage cost, by bisection; ``totals[i]`` is the cost of the first i layers."""

    def fits(limit: int) -> bool:
        # Stages filled greedily; fewer than num_stages will do, as a stage can be cut further without costing more.
        start = 0
        for _ in range(num_stages):
            start = bisect_right(totals, totals[start] + limit) - 1
        return start == len(totals) - 1

    low, high = -1, totals[-1]  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _most_even(totals: list[int], num_stages: int, limit: int) -> tuple[range, ...]:
    """The cut with the least sum of squares among those whose stages cost at most ``limit``: dynamic programming."""
    num_layers = len(totals) - 1
    infeasible = totals[-1] ** 2 + 1
    least = [infeasible] * num_layers + [0]  # least[i]: sum of squares of layers i.. in the stages considered so far
    first_cuts = []  # per number of stages, per first layer i: where the first of these stages ends
    for stages in range(1, num_stages + 1):
        before, least = least, [infeasible] * (num_layers + 1)
        cuts = [num_layers] * (num_layers + 1)
        for start in range(num_stages - stages, num_layers - stages + 1):
            for end in range(start + 1, num_layers - stages + 2):
                cost = totals[end] - totals[start]
                if cost > limit:
                    break
                squares = cost * cost + before[end]
                if squares < least[start]:
                    least[start], cuts[start] = squares, end
        first_cuts.append(cuts)
    ranges, start = [], 0
    for cuts in reversed(first_cuts):
        ranges.append(range(start, cuts[start]))
        start = cuts[start]
    return tuple(ranges)
