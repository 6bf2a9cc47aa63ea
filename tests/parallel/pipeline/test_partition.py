"""The cut of layers into stages against brute force."""

import itertools
import random
import time

import pytest

from parallel.pipeline import partition


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
