"""A trace of a few steps, for `chrome://tracing` or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from engine.errors import OutputError


class StepProfiler:
    """Records steps `first` to `last` (1-based, both included) with torch's profiler; one file per rank. A run that
    goes on between them records the rest.

    Args:
        steps: (first, last). folder: where `rank0.json` and so on go; made if missing.
    """

    def __init__(self, steps: tuple[int, int], folder: Path, rank: int) -> None:
        self.first, self.last = steps
        self.path = folder / f"rank{rank}.json"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._records = False
        self._profile = profile(activities=activities)

    def before(self, step: int) -> None:
        """Call before step `step`."""
        if self.first <= step <= self.last and not self._records:
            self._records = True
            self._profile.start()

    def after(self, step: int) -> None:
        """Call after step `step`."""
        if step == self.last:
            self.finish()

    def finish(self) -> None:
        """No step comes any more: write what was recorded, if anything is."""
        if self._records:
            self._records = False
            self._profile.stop()
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._profile.export_chrome_trace(str(self.path))
            except (OSError, RuntimeError) as error:
                raise OutputError(f"the trace {self.path} cannot be written: {error}") from error
