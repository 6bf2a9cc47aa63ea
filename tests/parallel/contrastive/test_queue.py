"""The queue of keys over one to three ranks against a plain ring of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.contrastive.queue import KeyQueue
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import run_ranks

LENGTH, WIDTH = 11, 3
CPU = torch.device("cpu")


def _batch(step: int, count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(step))


def _whole(queue: KeyQueue) -> Tensor:
    """All keys, from the pieces that ranks list."""
    keys, place = queue.pieces()
    assert int(place.values) == queue.position and keys.layout.shape == (LENGTH, WIDTH)
    whole = torch.zeros(LENGTH, WIDTH)
    for box, values in keys.boxes(own=True):
        box.of(whole, (0, 0)).copy_(values)
    return comm.all_reduce(whole, queue.axis)


def _pushed(axis: Axis) -> None:
    queue, plain = KeyQueue(LENGTH, WIDTH, 5, axis, CPU), KeyQueue(LENGTH, WIDTH, 5, single_axis("data"), CPU).keys
    torch.testing.assert_close(_whole(queue), plain, rtol=0, atol=0)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(LENGTH))
    place = 0
    for step, sizes in enumerate(((1, 2, 1), (0, 4, 2), (5, 0, 0), (2, 2, 3), (9, 4, 6), (0, 0, 0), (1, 1, 0))):
        counts = sizes[: axis.size]
        total, first = sum(counts), sum(counts[: axis.index])
        keys = _batch(step, total)
        queue.push(keys[first : first + counts[axis.index]])
        for row in keys:
            plain[place] = row
            place = (place + 1) % LENGTH
        torch.testing.assert_close(_whole(queue), plain, rtol=0, atol=0)
        assert queue.position == place


def _on_ranks(world: World) -> None:
    _pushed(make_grid(GridShape(data=world.size), world).data)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_ranks_push_is_one_ring(ranks: int) -> None:
    run_ranks(ranks, _on_ranks)


def test_one_process_has_the_same() -> None:
    _pushed(single_axis("data"))


def test_more_ranks_than_places_are_refused() -> None:
    axis = Axis(name="data", ranks=(0, 1, 2), index=0, planned=True)
    with pytest.raises(ValueError, match="a queue of 2 keys over 3 ranks"):
        KeyQueue(2, WIDTH, 0, axis, CPU)
