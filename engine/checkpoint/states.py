"""All that a run would need to go on, as pieces of logical tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.assemble import Assembly
from parallel.sharding.pieces import StatePiece, whole_piece


def state_pieces(a: Assembly) -> Iterator[StatePiece]:
    """What this rank holds: weights, frozen ones too, then the optimizer's state, average, fp8 histories, numbers.

    Names are the same in every layout, and so are the logical tensors that the pieces of all ranks make up.
    """
    yield from a.store.pieces("weights", {bucket: bucket.master for bucket in a.store.buckets})
    yield from a.optimizer.pieces()
    if a.average is not None:
        yield from a.average.pieces()
    if a.fp8 is not None:
        for name, values in a.fp8.state_dict().items():
            yield whole_piece(f"fp8/{name}", values, a.store.axis)
    for name, number in _numbers(a).items():
        yield whole_piece(name, torch.tensor(number, dtype=torch.float64), a.grid.world)


def _numbers(a: Assembly) -> dict[str, float]:
    numbers = {"optimizer.steps": float(a.optimizer.steps)}
    if a.average is not None:
        numbers["average.updates"] = float(a.average.updates)
    if a.scaler is not None:
        numbers |= {f"loss_scale.{name}": float(value) for name, value in a.scaler.state_dict().items()}
    return numbers
