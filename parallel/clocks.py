"""How the clocks of hosts differ, so that moments of different ranks can be told in one time.

Processes of one host share a monotonic clock. For each other host its first rank exchanges readings with the first rank
of all: a reading that comes back is as good as half of its round trip, and the least of several round trips counts
(Cristian 1989, "Probabilistic clock synchronization").
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from parallel import comm, host
from parallel.comm import Axis
from parallel.messages import exchange_start

_ROUNDS = 16


def offset_to_first(
    axis: Axis, identity: str | None = None, clock: Callable[[], int] = time.perf_counter_ns
) -> tuple[int, int]:
    """(nanoseconds to add to this rank's monotonic clock to have that of the axis's first rank, how far off that is at
    most). Collective.

    Args:
        identity: of this rank's host (default: found out). clock: of this rank.
    """
    identities = comm.gather_objects(host.identity() if identity is None else identity, axis)
    others = sorted({identities.index(name) for name in identities} - {0})  # the first rank of each other host
    found = (0, 0)
    for rank in others:
        if axis.index == 0:
            _answer(axis, rank, clock)
        elif axis.index == rank:
            found = _ask(axis, clock)
    offsets = comm.gather_objects(found, axis) if others else [found] * axis.size
    offset, error = offsets[identities.index(identities[axis.index])]
    return offset, error


def _answer(axis: Axis, rank: int, clock: Callable[[], int]) -> None:
    for _ in range(_ROUNDS):
        message = torch.zeros(1, dtype=torch.int64, device=comm.device_of(axis))
        exchange_start([], [(message, rank)], axis).wait()
        message.item()  # waits for a GPU, too
        exchange_start([(torch.full_like(message, clock()), rank)], [], axis).wait()


def _ask(axis: Axis, clock: Callable[[], int]) -> tuple[int, int]:
    """(offset, half of the round trip) of the quickest exchange."""
    best = None
    for _ in range(_ROUNDS):
        message = torch.zeros(1, dtype=torch.int64, device=comm.device_of(axis))
        answer = torch.empty_like(message)
        before = clock()
        exchange_start([(message, 0)], [], axis).wait()
        exchange_start([], [(answer, 0)], axis).wait()
        there = int(answer.item())
        after = clock()
        exchange = (there - (before + after) // 2, (after - before + 1) // 2)
        best = exchange if best is None or exchange[1] < best[1] else best
    assert best is not None
    return best
