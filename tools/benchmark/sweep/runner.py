"""Runs of a sweep, one after the other, or of two programs by turns, and the lines that come of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tools.benchmark.sweep.file import SweepFile, failures
from tools.benchmark.sweep.grid import Layout, settings, to_yaml
from tools.benchmark.sweep.ranks import Ranks, RanksFailedError, RanksStoppedError, Started, await_all
from tools.benchmark.sweep.run import Task
from tools.benchmark.table import Row

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Those of the command line; see there."""

    grid: str
    json: Path
    ranks: int | None = None
    threads: int | None = None
    steps: int = 10
    warmup: int = 3
    rounds: int = 5
    timeout: int = 1800
    fresh: bool = False
    retry: bool = False
    launch: str = "auto"
    against: Path | None = None
    tolerance: float | None = None
    clock: str = "wall"

    @property
    def picture(self) -> Path:
        """Beside the file."""
        return self.json.with_suffix(".png")


@dataclass(frozen=True, kw_only=True)
class Side:
    """A program that is measured: its checkout and its file. With --against there are two, ours first."""

    root: Path
    file: SweepFile

    def done(self, layout: Layout, round_: int) -> bool:
        """Whether this run has been made."""
        return any(line["status"] == "done" and line["round"] == round_ for line in self._lines(layout))

    def failed(self, layout: Layout) -> bool:
        """Whether a run of this layout has failed, as another would, and has not been made since."""
        return bool(failures(self._lines(layout)))

    def _lines(self, layout: Layout) -> list[Row]:
        return [line for line in self.file.lines if line["config_hash"] == layout.identity]


class Stop:
    """While it is entered, signals that ask to stop are noted: a call tells whether one has come."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Stop:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = number

    def __call__(self) -> bool:
        return self.signal is not None


def about(layout: Layout) -> Row:
    """What every line says of its layout."""
    return {
        "entry": layout.entry,
        "config_hash": layout.identity,
        "ranks": layout.ranks,
        "threads": layout.threads,
        "config": settings(layout.config),
    }


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Makes runs, with its files in `folder`. by_steps: programs that are compared run at once and take turns there."""

    options: Options
    launch: str | None
    folder: Path
    stop: Stop
    by_steps: bool

    def run(self, roots: Sequence[Path], layout: Layout, round_: int) -> list[Row | None]:
        """The lines of a run of each program, the first of which begins. None of one that was ended since the other has
        failed; none at all if they were stopped.
        """
        if not self.by_steps and len(roots) > 1:
            return [line for root in roots for line in self.run([root], layout, round_)]
        turns = "steps" if len(roots) > 1 else "runs"
        line = {**about(layout), "round": round_, "turns": turns, "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        folders = [self.folder / str(number) for number in range(len(roots))]
        tasks = self._tasks(folders, layout)
        of_layout = partial(Ranks, launch=self.launch, ranks=layout.ranks, threads=layout.threads)
        programs = [
            of_layout(root=root, task=task, folder=folder).start()
            for root, task, folder in zip(roots, tasks, folders, strict=True)
        ]
        await_all(programs, self.options.timeout, self.stop)
        failed = any(any(program.codes) for program in programs)
        try:
            lines = [
                None
                if failed and None in program.codes and not any(program.codes)
                else self._line(line, program, layout.shape)
                for program in programs
            ]
        except RanksStoppedError:
            self.stop.signal = self.stop.signal or signal.SIGTERM
        return [] if self.stop() else lines

    def _tasks(self, folders: Sequence[Path], layout: Layout) -> list[Path]:
        """A file for the ranks of each program, in new folders, with pipes between them if they are two."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "config.yaml").write_text(to_yaml(settings(layout.config)))
        pipes = [str(folder / "turn") for folder in folders]
        if len(folders) > 1:
            for pipe in pipes:
                for rank in range(layout.ranks):
                    os.mkfifo(f"{pipe}.{rank}")
        for i, folder in enumerate(folders):
            task = Task(
                config=str(folder / "config.yaml"), ranks=layout.ranks, result=str(folder / "result.json"),
                steps=self.options.steps, warmup=self.options.warmup,
                turns=(pipes[i], pipes[1 - i]) if len(folders) > 1 else None, first=i == 0,
                parent=os.getpid() if self.launch is None else None,
            )  # fmt: skip
            (folder / "task.json").write_text(json.dumps(asdict(task)))
        return [folder / "task.json" for folder in folders]

    def _line(self, line: Row, program: Started, shape: str | None) -> Row:
        """Raises RanksStoppedError."""
        try:
            program.check(self.options.timeout)
            measured = json.loads((program.ranks.folder / "result.json").read_text())
            if (grid := measured.get("grid_p_d_c_t")) != shape:
                raise RanksFailedError(f"ranks have measured the grid {grid}, not {shape}")
            return {"status": "done", **line, **measured}
        except RanksFailedError as error:
            return {"status": "failed", **line, "why": str(error), "last_words": error.words}
        except (OSError, ValueError) as error:
            return {"status": "failed", **line, "why": f"ranks have left no result: {error}", "last_words": []}


def take_turns(sides: Sequence[Side], layouts: Sequence[Layout], runner: Runner) -> None:
    """Rounds of one run each. Every other round goes backwards, so that a machine that drifts favours none."""
    fit = list(enumerate(layout for layout in layouts if layout.why is None))
    turns = [
        (round_, layout, sides[:: -1 if (i + round_) % 2 else 1])
        for round_ in range(runner.options.rounds)
        for i, layout in fit[:: -1 if round_ % 2 else 1]
        if not all(side.done(layout, round_) for side in sides)
    ]
    for number, (round_, layout, own) in enumerate(turns, 1):
        for _ in own:  # again for one that was ended since the other has failed
            ready = [side for side in own if runner.options.retry or not side.failed(layout)]
            if all(side.done(layout, round_) for side in ready):
                break
            lines = runner.run([side.root for side in ready], layout, round_)
            if runner.stop():
                return
            told = [(side, line) for side, line in zip(ready, lines, strict=True) if line is not None]
            for side, line in told:
                side.file.append(line)
            for side, line in told:
                where = layout.name if side is sides[0] else f"{layout.name} ({side.root})"
                print(f"[{number}/{len(turns)}] round {round_ + 1}, {where}: {_outcome(line)}", flush=True)


def _outcome(line: Row) -> str:
    return f"{line['images_per_second']:.4g} images/s" if line["status"] == "done" else f"failed: {line['why']}"


@contextmanager
def folder_beside(beside: Path) -> Iterator[Path]:
    """For files of runs, where all hosts see them; those that a killed sweep into `beside`, which is locked, has left
    are removed. Each sweep has one of its own, since ranks of a killed one may live on for a while on other hosts.
    """
    folder, prefix = beside.with_name(f".{beside.name}.runs"), "sweep-"
    folder.mkdir(exist_ok=True)
    for left in folder.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        yield Path(name).resolve()
    with suppress(OSError):  # something else is in it
        folder.rmdir()
