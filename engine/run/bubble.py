"""The measured bubble of training steps: the share of the pass in which ranks did not compute."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from parallel import comm
from parallel.grid import Grid
from parallel.pipeline.recording import Recorder, bubble_share, own_figures

_FIGURES = 3  # of a rank: busy time, start and end of its pass


class BubbleMeter:
    """Times each pass of a pipeline, and has the figures of all ranks from the all-reduce that a step makes anyway.

    On CPUs every step is timed; on CUDA, where each action needs two events, those that are recorded (and there alone
    the GPU is waited for). Ranks that share memory share the clock, too. Others count from the last moment at which all
    have met.

    Attributes:
        recorder: of this rank.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.recorder = Recorder(device)
        self._grid, self._on_cpu = grid, device.type == "cpu"
        self._has_common_clock = grid.world.channel is not None
        self._met: float | None = 0.0 if self._has_common_clock else None
        self._times = False

    def begin(self) -> None:
        """A pass of a training step begins. Collective where no other call has been before."""
        grid, where = self._grid, self._grid.meter.where
        self._times = grid.pipeline.size > 1 and (self._on_cpu or self.recorder.is_recording)
        if self._times or self.recorder.is_recording:
            self.recorder.begin_pass()
            where.listener = self.recorder
        if self._times and self._met is None:
            comm.barrier(grid.world)
            self.met()

    def met(self) -> None:
        """All ranks were in one collective until now."""
        if not self._has_common_clock:
            self._met = time.perf_counter()

    def votes(self) -> list[float]:
        """This rank's figures for the all-reduce over the world, after the pass."""
        if not self._times:
            return []
        busy, start, end = self.recorder.busy()
        assert self._met is not None
        return own_figures((busy, start - self._met, end - self._met), self._grid.rank, self._grid.shape.world_size)

    def end(self, totals: Sequence[float]) -> tuple[tuple[float, ...], float | None]:
        """(what others than `votes` brought, the bubble of the pass or None) of what the all-reduce gave."""
        self.met()
        if not self.recorder.is_recording:
            self._grid.meter.where.listener = None
        if not self._times:
            return tuple(totals), None
        count = len(totals) - _FIGURES * self._grid.shape.world_size
        stages = self._grid.pipeline.size  # the slowest axis of the grid: a row of this is a pipeline rank's
        figures = torch.tensor(totals[count:], dtype=torch.float64).view(stages, -1, _FIGURES)
        return tuple(totals[:count]), bubble_share(figures)
