"""What was predicted when the run started, beside what its first steps have taken."""

from __future__ import annotations

import torch

from engine.device import peak_memory_bytes
from engine.recompute_choice import Choice
from model.kernels import give_back, most_in_pool
from parallel import comm
from parallel.grid import Grid

_STEPS = 3  # the first is not timed: it makes what others find made


class Comparison:
    """Of a choice by `engine.recompute_choice` with a run. To be made before the model is.

    Memory that is measured is the most that tensors had from now on, on a CPU those in the pool; without one, by how
    much resident memory has grown at its fullest, with holes in the heap.
    """

    def __init__(self, choice: Choice, device: torch.device) -> None:
        self._choice, self._device, self._seconds = choice, device, list[float]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            give_back()
        self._before = 0 if device.type == "cuda" else self._most()

    def after_step(self, seconds: float, grid: Grid) -> list[str]:
        """A line once, after the third step of this attempt. Collective then.

        Args:
            seconds: that the step took.
        """
        self._seconds.append(seconds)
        if len(self._seconds) != _STEPS:
            return []
        own = grid.pipeline.index, self._most() - self._before
        found = comm.gather_objects(own, grid.world)
        most = [max(grown for place, grown in found if place == rank) for rank in range(grid.pipeline.size)]
        took = sum(self._seconds[1:]) / (_STEPS - 1)
        return [
            f"recompute: planned {_mib(self._choice.peaks)} MiB, measured {_mib(most)} {self._what} (by pipeline "
            f"rank); forwards and backwards {1e3 * self._choice.pass_seconds:,.1f} ms predicted, whole steps "
            f"{1e3 * took:,.1f} ms"
        ]

    def _most(self) -> int:
        """Bytes so far."""
        pool = most_in_pool() if self._device.type == "cpu" else None
        return peak_memory_bytes(self._device) if pool is None else pool

    @property
    def _what(self) -> str:
        if self._device.type == "cuda":
            return "in tensors"
        return "more resident, holes in the heap included" if most_in_pool() is None else "in tensors of 64 KiB or more"


def _mib(sizes: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"{size / 2**20:,.1f}" for size in sizes)
