"""Records of a few steps, for `chrome://tracing` or Perfetto: the timeline of all ranks, and torch's traces."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from engine.assembly import Assembly
from engine.errors import OutputError
from engine.run.timeline import NAME, merge, part_of, ranks_shown, room_of, write_part
from parallel import comm
from parallel.clocks import offset_to_first
from parallel.pipeline.boundary import routes_between_ranks
from parallel.pipeline.post import message_bytes
from parallel.pipeline.recording import Recorder, StepRecord


class TimelineRecording:
    """The timeline of chosen steps. All calls are collective.

    Args:
        recorder: hears what this rank is at. folder: where the files go. say: tells the user one line, on rank 0 alone.
    """

    def __init__(
        self, assembly: Assembly, recorder: Recorder, folder: Path, say: Callable[[str], None] | None = None
    ) -> None:
        self._assembly, self._recorder, self._folder, self._say = assembly, recorder, folder, say
        self._grid = assembly.grid
        self._records: list[StepRecord] = []
        self._traced: list[int] = []
        self._room, self._left_out = room_of(self._grid.shape), 0

    def before(self, step: int, *, traced: bool) -> None:
        """Step `step` comes. traced: by torch's profiler, too, which slows it."""
        if traced:
            self._traced.append(step)
        comm.barrier(self._grid.world)  # nobody is late because he has written or prepared something
        self._recorder.begin_step(step, self._room // 2)
        self._grid.meter.where.listener = self._recorder

    def after(self) -> None:
        """It is over. Steps that would be too much to look at are left out, but never the first."""
        self._grid.meter.where.listener = None
        record = self._recorder.end_step()
        full = sum(map(len, self._records)) + len(record) > self._room
        if self._left_out or (self._records and full):
            self._left_out += 1
        else:
            self._records.append(record)

    def finish(self) -> None:
        """Write what was recorded. Raises OutputError if that cannot be."""
        with self._grid.meter.where.during("writing the timeline"):
            self._write()

    def _write(self) -> None:
        grid, schedule = self._grid, self._assembly.schedule
        offset, error = offset_to_first(grid.world)
        first = self._records[0].span
        assert first is not None
        origin = min(comm.gather_objects(first[0] + offset, grid.world))  # Perfetto drops what lies before 0
        shown = ranks_shown(grid.shape)
        path, out = part_of(self._folder, grid.rank), self._folder / NAME
        told = {
            "name": schedule.name,
            "policy": self._assembly.policy,
            "forward_passes": self._assembly.objective.forward_passes,
            "num_stages": schedule.num_stages,
            "stage_to_rank": schedule.stage_to_rank,
        }
        header = {
            "rank": grid.rank,
            "grid": dict(zip(("pipeline", "data", "context", "tensor"), grid.shape.sizes, strict=True)),
            "replicas": grid.shape.world_size // grid.shape.pipeline,
            "steps": [record.step for record in self._records],
            "traced": self._traced,
            "clock_error": error,
            "missing": sum(record.missing for record in self._records),
            "schedule": told | ({"text": str(schedule)} if grid.rank == 0 else {}),
        }
        try:
            if grid.rank in shown:
                routes = routes_between_ranks(schedule.stage_to_rank, self._assembly.boundaries)
                nbytes = {route: message_bytes(specs) for route, specs in routes.items()}
                write_part(path, self._records, header, schedule, nbytes, grid.shape, offset - origin)
            comm.barrier(grid.world)
            if grid.rank == 0:
                self._merge([part_of(self._folder, rank) for rank in shown], out)
        except OSError as problem:
            raise OutputError(f"the timeline {out} cannot be written: {problem}") from problem

    def _merge(self, parts: list[Path], out: Path) -> None:
        here = [part for part in parts if part.exists()]
        summary = merge(here, out)
        if len(here) == len(parts):
            for part in here:
                part.unlink()
        if self._say is not None:
            self._say(f"timeline    {out}: {_told(summary, self._left_out, len(parts) - len(here))}")


def _told(summary: dict, left_out: int, missing: int) -> str:
    steps, simulated = summary["steps"], summary["bubble_simulated"]
    text = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    if summary["grid"]["pipeline"] > 1:
        measured = sum(summary["bubble"].values()) / len(steps)
        text += f", bubble {100 * measured:.1f} %"
        text += f", {100 * simulated:.1f} % as simulated with their times" if simulated is not None else ""
    if left_out:
        text += f"; {left_out} more left out, which would be too much to look at"
    if lost := sum(summary["not_recorded"].values()):
        text += f"; {lost} collectives left out"
    if missing:
        text += f"; without {missing} rank(s), whose parts lie on other hosts"
    return text


class StepProfiler:
    """Records steps `first` to `last` (1-based, both included). A run that goes on between them records the rest.

    The timeline has all these steps. Torch's profiler, which slows what it watches, traces the first of them alone.

    Args:
        steps: (first, last). folder: where `rank0.json` and so on go; made if missing.
    """

    def __init__(
        self, steps: tuple[int, int], folder: Path, rank: int, timeline: TimelineRecording | None = None
    ) -> None:
        self.first, self.last = steps
        self.path, self._timeline = folder / f"rank{rank}.json", timeline
        has_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]
        if not has_gpu:  # the profiler says on stderr when it starts and stops; that silences its errors, of GPUs, too
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._began = self._records = self._traces = False
        self._profile = profile(activities=activities)

    def before(self, step: int) -> None:
        """Call before step `step`. Collective, as are the other calls."""
        if not self.first <= step <= self.last:
            return
        self._traces = not self._began
        self._began = self._records = True
        if self._traces:
            self._profile.start()
        if self._timeline is not None:
            self._timeline.before(step, traced=self._traces)

    def after(self, step: int) -> None:
        """Call after step `step`."""
        if not self._records:
            return
        if self._timeline is not None:
            self._timeline.after()
        if self._traces:
            self._traces = False
            self._profile.stop()
        if step == self.last:
            self.finish()

    def finish(self) -> None:
        """No step comes any more: write what was recorded, if anything is."""
        if not self._records:
            return
        self._records = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            raise OutputError(f"the trace {self.path} cannot be written: {error}") from error
        if self._timeline is not None:
            self._timeline.finish()
