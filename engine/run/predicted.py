"""What was predicted when the run started, beside what its first steps have taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import Config
from engine.device import peak_memory_bytes
from engine.plan import peaks
from engine.recompute_choice import Choice
from model.kernels import give_back, most_in_pool
from parallel import comm
from parallel.grid import Grid

_STEPS = 3  # the first is not timed: it makes what others find made


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Of a run.

    Attributes:
        peaks: bytes of each pipeline rank. pass_seconds: of all forwards and backwards of a step, where layers were
            timed.
        line: for the console.
    """

    peaks: tuple[int, ...]
    pass_seconds: float | None
    line: str


def predicted(config: Config, choice: Choice | None, grid: Grid, memory: float, *, on_cpu: bool) -> Predicted | None:
    """What was chosen is predicted to take, or what the policy that was given; with policy none nothing is, which would
    take a second. The first rank finds it, for all. Collective.

    Args:
        config: as it runs. memory: bytes that this rank may count on; what goes by it goes by the least of all ranks.
            on_cpu: whether ranks are processes of one host.
    """
    if choice is not None:
        return Predicted(peaks=choice.peaks, pass_seconds=choice.pass_seconds, line=choice.describe())
    if config.recompute.policy == "none":
        return None
    least = comm.least(memory, grid.world)
    found = peaks(config, grid.shape, least, on_cpu=on_cpu) if grid.world.index == 0 else ()
    found = comm.gather_objects(found, grid.world)[0]
    return Predicted(peaks=found, pass_seconds=None, line=f"recompute: {_mib(found)} MiB planned (by pipeline rank)")


class Comparison:
    """Of what was predicted with a run. To be made before the model is.

    Memory that is measured is the most that tensors had from now on, on a CPU those in the pool; without one, by how
    much resident memory has grown at its fullest, with holes in the heap.
    """

    def __init__(self, predicted: Predicted, device: torch.device) -> None:
        self._predicted, self._device, self._seconds = predicted, device, list[float]()
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
        timed = self._predicted.pass_seconds
        passes = "" if timed is None else f"forwards and backwards {1e3 * timed:,.1f} ms predicted, "
        return [
            f"recompute: planned {_mib(self._predicted.peaks)} MiB, measured {_mib(most)} {self._what} (by pipeline "
            f"rank); {passes}whole steps {1e3 * took:,.1f} ms"
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
