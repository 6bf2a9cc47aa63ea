"""Ranks and coordinates against numpy's reshape, and groups that reduce over the ranks they should."""

import time
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel import comm
from parallel.failures import PeerLostError
from parallel.grid import AXES, GridShape, make_grid, planned_grid, shape_for_world
from parallel.process_group import World
from tests.distributed import run_ranks

SUBSETS = [names for count in range(1, 5) for names in combinations(AXES, count)]


def shape_of(sizes: tuple[int, ...]) -> GridShape:
    return GridShape(**dict(zip(AXES, sizes, strict=True)))


@pytest.mark.parametrize("sizes", list(product((1, 2, 3), repeat=4)), ids=str)
def test_coordinates_are_those_of_a_row_major_array(sizes: tuple[int, ...]) -> None:
    shape = shape_of(sizes)
    table = np.arange(shape.world_size).reshape(sizes)
    for rank in range(shape.world_size):
        place = shape.coordinates(rank)
        assert tuple(place) == AXES
        assert table[tuple(place.values())] == rank


@pytest.mark.parametrize("sizes", [(2, 3, 1, 2), (1, 2, 2, 2), (3, 1, 2, 2), (1, 1, 1, 1)], ids=str)
def test_ranks_along(sizes: tuple[int, ...]) -> None:
    shape = shape_of(sizes)
    table = np.arange(shape.world_size).reshape(sizes)
    for rank, names in product(range(shape.world_size), SUBSETS):
        place = shape.coordinates(rank)
        expected = table[tuple(slice(None) if name in names else place[name] for name in AXES)]
        assert shape.ranks_along(names, rank) == tuple(expected.ravel())


def test_tensor_is_innermost_and_pipeline_outermost() -> None:
    shape = GridShape(pipeline=2, data=2, tensor=2)
    assert shape.ranks_along(("tensor",), 5) == (4, 5)
    assert shape.ranks_along(("data",), 5) == (5, 7)
    assert shape.ranks_along(("pipeline",), 5) == (1, 5)


def _reduce_over_every_combination(world: World) -> dict[tuple[str, ...], tuple[float, int, bool]]:
    grid = make_grid(GridShape(pipeline=2, data=2, tensor=2), world)
    planned = planned_grid(grid.shape, world.rank)
    found = {}
    for names in SUBSETS:
        axis = grid.along(*reversed(names))  # the order in which names are given does not matter
        assert grid.along(*names) is axis
        plan = planned.along(*names)
        assert (plan.name, plan.ranks, plan.index, plan.size) == (axis.name, axis.ranks, axis.index, axis.size)
        sum_of_powers = comm.all_reduce(torch.tensor(2.0**world.rank), axis).item()  # tells exactly who took part
        found[names] = (sum_of_powers, axis.index, axis.group is None)
    assert grid.meter.calls["all_reduce"] == sum(not alone for *_, alone in found.values())
    grid.close()
    dist.barrier()  # the world's group outlives the grid
    return found


def test_groups_reduce_over_their_ranks() -> None:
    shape = GridShape(pipeline=2, data=2, tensor=2)
    for rank, found in enumerate(run_ranks(8, _reduce_over_every_combination, timeout=90)):
        for names, (total, index, alone) in found.items():
            ranks = shape.ranks_along(names, rank)
            assert total == sum(2.0**r for r in ranks), (rank, names)
            assert ranks[index] == rank
            assert alone == (len(ranks) == 1)


def _wait_for_nobody(world: World) -> list[float]:
    """Rank 0 comes to its axes, the others do not."""
    grid, waited = make_grid(GridShape(data=2, tensor=2), world, shared_memory=False, timeout=1.0), []
    for name in ("data", "tensor"):
        start = time.monotonic()
        if world.rank == 0:
            with pytest.raises(PeerLostError, match=f"{name} axis"):
                comm.all_reduce(torch.ones(2), grid.along(name))
        waited.append(time.monotonic() - start)
    dist.barrier()  # the others stay meanwhile
    return waited


def test_every_axis_has_the_time_out_of_the_grid() -> None:
    assert all(seconds < 20 for seconds in run_ranks(4, _wait_for_nobody, timeout=60)[0])


def test_one_process_makes_no_group() -> None:
    grid = make_grid(GridShape())
    assert [axis.group for axis in (grid.pipeline, grid.data, grid.context, grid.tensor, grid.world)] == [None] * 5
    assert grid.world.ranks == (0,)
    assert not dist.is_initialized()


def test_a_planned_grid_needs_no_process_group() -> None:
    shape = GridShape(pipeline=3, data=4, context=2, tensor=8)
    for rank in (0, 77, 191):
        grid, place = planned_grid(shape, rank), shape.coordinates(rank)
        for name in AXES:
            axis = getattr(grid, name)
            assert axis.planned and axis.group is None
            assert (axis.size, axis.index) == (getattr(shape, name), place[name])
        assert grid.world.size == 192 and grid.world.index == rank
        assert grid.along("data", "context").ranks == shape.ranks_along(("data", "context"), rank)
        assert grid.along("context", "data") is grid.along("data", "context")
        grid.close()
    assert not dist.is_initialized()


def test_data_parallel_takes_what_is_left() -> None:
    assert shape_for_world(24, tensor=2, pipeline=3) == GridShape(pipeline=3, data=4, tensor=2)
    assert shape_for_world(8, tensor=2, pipeline=1, context=2).data == 2
    assert shape_for_world(1, tensor=1, pipeline=1) == GridShape()


def test_worlds_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"10 ranks .* tensor 2 x pipeline 2 = 4 .* start 8 or 12 ranks"):
        shape_for_world(10, tensor=2, pipeline=2)
    with pytest.raises(ValueError, match=r"tensor 2 x pipeline 1 x context 3 = 6 .* start 6 ranks"):
        shape_for_world(2, tensor=2, pipeline=1, context=3)
    with pytest.raises(ValueError, match=r"parallel\.tensor_parallel_size is 0: it must be at least 1"):
        shape_for_world(4, tensor=0, pipeline=1)
