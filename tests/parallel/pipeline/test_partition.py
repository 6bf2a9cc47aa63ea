"""The cut of layers into stages against brute force."""

import itertools
import random
import time

import pytest

from parallel.pipeline import Costs, balance, build_schedule, partition, simulate


def loads(costs: list[float], ranges: tuple[range, ...]) -> list[float]:
    return [sum(costs[i] for i in layers) for layers in ranges]


def brute_force(costs: list[float], num_stages: int) -> tuple[range, ...]:
    """Least largest load, then least sum of squares, then shortest first stages."""
    candidates = []
    for inner in itertools.combinations(range(1, len(costs)), num_stages - 1):
        ranges = tuple(itertools.starmap(range, itertools.pairwise([0, *inner, len(costs)])))
        stage_loads = loads(costs, ranges)
        candidates.append((max(stage_loads), sum(load * load for load in stage_loads), inner, ranges))
    return min(candidates, key=lambda candidate: candidate[:3])[3]


@pytest.mark.parametrize("seed", range(200))
def test_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    costs = [float(draw.choice([0, 1, 1, 2, 3, 5, 13])) for _ in range(draw.randint(1, 9))]
    for num_stages in range(1, len(costs) + 1):
        assert partition(costs, num_stages) == brute_force(costs, num_stages)


def test_equal_layers_that_do_not_divide() -> None:
    assert [len(layers) for layers in partition([0.1] * 13, 4)] == [3, 3, 3, 4]
    assert [len(layers) for layers in partition([0.1] * 12, 4)] == [3, 3, 3, 3]


def test_a_heavy_layer_does_not_excuse_uneven_others() -> None:
    assert loads([9.0, 1, 1, 1, 1, 1, 1], partition([9.0, 1, 1, 1, 1, 1, 1], 3)) == [9, 3, 3]


def test_layers_without_cost() -> None:
    assert partition([0.0, 0.0, 0.0], 3) == (range(1), range(1, 2), range(2, 3))
    assert all(len(layers) > 0 for layers in partition([0.0, 0.0, 5.0, 0.0], 3))


def test_large_models_are_quick() -> None:
    draw = random.Random(0)
    costs = [1000.0, *(draw.uniform(1.0, 2.0) for _ in range(199))]
    start = time.process_time()
    for num_stages in (2, 16, 64, 200):
        ranges = partition(costs, num_stages)
        assert [i for layers in ranges for i in layers] == list(range(200))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("costs", "num_stages", "message"),
    [
        ([], 1, "no layers to cut into stages: costs is empty"),
        ([1.0, 2.0], 3, "cannot cut 2 layers into 3 stages, .* choose 1 to 2 stages"),
        ([1.0, 2.0], 0, "cannot cut 2 layers into 0 stages"),
        ([1.0, -2.0], 1, r"layer 1 has cost -2\.0: costs must be finite and not negative"),
        ([float("nan")], 1, "layer 0 has cost nan"),
        ([float("inf")], 1, "layer 0 has cost inf"),
    ],
)
def test_bad_arguments(costs: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(costs, num_stages)


def shares(costs: list[float], ranges: tuple[range, ...], ranks: tuple[int, ...]) -> list[float]:
    """Of each rank."""
    found = [0.0] * (max(ranks) + 1)
    for load, rank in zip(loads(costs, ranges), ranks, strict=True):
        found[rank] += load
    return found


def squares(costs: list[float], ranges: tuple[range, ...], ranks: tuple[int, ...]) -> float:
    return sum(x * x for x in (*loads(costs, ranges), *shares(costs, ranges, ranks)))


@pytest.mark.parametrize("seed", range(50))
def test_ranks_with_several_stages_have_even_shares(seed: int) -> None:
    """Never less even than before, mostly as even as can be; each stage has layers."""
    draw = random.Random(seed)
    ranks = draw.choice([(0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 2, 1, 0), (0, 1, 0, 1, 0, 1), (0, 1, 1, 0, 0)])
    costs = [float(draw.choice([0, 1, 2, 3, 13])) for _ in range(draw.randint(len(ranks), 10))]
    before = partition(costs, len(ranks))
    after = balance(costs, before, ranks)
    assert [i for stage in after for i in stage] == list(range(len(costs))) and all(after)
    assert squares(costs, after, ranks) <= squares(costs, before, ranks)
    cuts = itertools.combinations(range(1, len(costs)), len(ranks) - 1)
    every = [tuple(itertools.starmap(range, itertools.pairwise([0, *cut, len(costs)]))) for cut in cuts]
    assert squares(costs, after, ranks) <= 1.3 * min(squares(costs, ranges, ranks) for ranges in every)


def test_a_step_is_as_long_as_the_rank_with_the_largest_share() -> None:
    """12 blocks between a cheap embedding and a cheap head, on four ranks as a V."""
    costs, schedule = [0.3, *[10.0] * 12, 0.1], build_schedule("zb_v", 4, 8)
    cuts = partition(costs, 8)
    assert max(shares(costs, cuts, schedule.stage_to_rank)) == 40
    even = balance(costs, cuts, schedule.stage_to_rank)
    assert max(shares(costs, even, schedule.stage_to_rank)) < 31

    def seconds(ranges: tuple[range, ...]) -> float:
        times = tuple(loads(costs, ranges))
        return simulate(schedule, Costs(forward=times, backward_input=times, backward_weight=times)).makespan

    assert seconds(cuts) > 1.15 * seconds(even)
    assert balance(costs, partition(costs, 4), (0, 1, 2, 3)) == partition(costs, 4)  # nothing to even out
