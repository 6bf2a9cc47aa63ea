"""Clocks of hosts that differ by known amounts."""

import time

from parallel.clocks import offset_to_first
from parallel.comm import Axis
from parallel.grid import world_axis
from parallel.process_group import World
from tests.distributed import run_ranks

HOSTS, AHEAD = ["one", "two", "one", "two", "three"], {"one": 0, "two": 5_000_000_000, "three": -7_000_000_000}


def _offset(world: World) -> tuple[tuple[int, int], tuple[int, int]]:
    axis: Axis = world_axis(world)
    name = HOSTS[world.rank]
    apart = offset_to_first(axis, name, lambda: time.perf_counter_ns() + AHEAD[name])
    return apart, offset_to_first(axis)


def test_clocks_of_hosts_are_aligned_and_that_of_one_host_is_common() -> None:
    for (apart, together), name in zip(run_ranks(len(HOSTS), _offset), HOSTS, strict=True):
        offset, error = apart
        assert abs(offset + AHEAD[name]) <= error
        assert (error > 0) == (name != "one")
        assert together == (0, 0)
