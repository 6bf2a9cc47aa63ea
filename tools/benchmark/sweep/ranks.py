"""Processes of one run of a sweep: their start, here or by a command such as srun, their end, why they failed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from parallel import slurm
from tools.benchmark.turns import free_port, rank_environment

_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 15.0  # for ranks that a failed one leaves behind: they may know more than it does
_SRUN = "srun --ntasks {ranks} --kill-on-bad-exit=1"
_STOPPED = {-signal.SIGTERM, 128 + signal.SIGTERM}  # the second is srun's way to tell
_MODULE = "tools.benchmark.sweep.run"


class RanksFailedError(RuntimeError):
    """A run came to nothing. The message is one line; words: the last that its ranks wrote."""

    def __init__(self, message: str, words: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.words = list(words)


def choose_launch(wanted: str) -> str | None:
    """What starts ranks: None for this program on this host, else a command with {ranks} in it that is followed by the
    arguments of Python. `auto` is srun in the batch script of a SLURM job of several tasks.

    Raises:
        ConfigError: a command that is not there, or says nowhere how many ranks it is to start.
    """
    if wanted == "local" or (wanted == "auto" and not _of_tasks()):
        return None
    command = f"{_SRUN} {shlex.quote(sys.executable)}" if wanted in ("auto", "srun") else wanted
    if shutil.which(first := (shlex.split(command) or [""])[0]) is None:
        raise ConfigError(f"--launch: there is no program {first!r} here: give local, srun, or a command that is")
    if "{ranks}" not in command:
        raise ConfigError(
            f"--launch {command!r} is not told how many ranks to start: write {{ranks}} there, such as '{_SRUN} python'"
        )
    return command


class RanksStoppedError(RuntimeError):
    """Somebody else has asked ranks to end: SLURM tells the steps of a job that is to make room, not its script."""


def _of_tasks() -> bool:
    """Whether this is the batch script, or the shell, of a job of several tasks."""
    try:
        slurm.task(os.environ)
    except slurm.NotATaskError:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What a run is started with.

    Attributes:
        launch: from `choose_launch`. ranks, threads: processes and threads of each; None leaves threads to ranks. root:
            the checkout whose code runs. task: file for run.py. folder: for logs.
    """

    launch: str | None
    ranks: int
    threads: int | None
    root: Path
    task: Path
    folder: Path

    def start(self) -> Started:
        """The processes, running; `await_all` is to follow."""
        return Started(ranks=self, processes=self._processes())

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        python = ["-m", _MODULE, str(self.task)]
        if self.launch is None:
            port = free_port()
            places = [
                rank_environment(rank, self.ranks, port, self.threads or 1, self.root) for rank in range(self.ranks)
            ]
            return [self._spawn([sys.executable, *python], place, rank) for rank, place in enumerate(places)]
        command = [part.replace("{ranks}", str(self.ranks)) for part in shlex.split(self.launch)]
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        return [self._spawn([*command, *python], {**os.environ, "PYTHONPATH": str(self.root), **threads}, 0)]

    def _spawn(self, command: Sequence[str], environment: dict[str, str], number: int) -> subprocess.Popen[bytes]:
        with self.log(number).open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def log(self, number: int) -> Path:
        return self.folder / f"{number}.log"


@dataclass(kw_only=True)
class Started:
    """Processes of a program. codes: what they have ended with, once `await_all` has returned; None: they were ended
    since it was too late, or another program had failed.
    """

    ranks: Ranks
    processes: list[subprocess.Popen[bytes]]
    codes: Sequence[int | None] = ()

    def check(self, patience: float) -> None:
        """Raises RanksFailedError or RanksStoppedError unless all have ended well."""
        if _STOPPED & set(self.codes):
            raise RanksStoppedError
        if any(code != 0 for code in self.codes):
            logs = [self.ranks.log(i).read_text(errors="replace").splitlines() for i in range(len(self.codes))]
            raise self._failure(logs, patience)

    def _failure(self, logs: Sequence[Sequence[str]], patience: float) -> RanksFailedError:
        """By who has most to say: out of memory, then a signal, since the others merely lost contact with that rank,
        then the words of the first that failed.
        """
        lines = [line for log in logs for line in log if line.strip()]
        failed = [number for number, code in enumerate(self.codes) if code]
        words = next((logs[number] for number in failed if logs[number]), lines)[-12:]
        if told := [line for line in lines if "out of memory: " in line]:
            return RanksFailedError(told[0], words)
        if signals := {number: name for number in failed if (name := self._signal(self.codes[number]))}:
            number, name = next(iter(signals.items()))
            who = f"rank {number}" if self.ranks.launch is None else "a rank"
            cause = ": by want of memory, if by nobody" if name == "SIGKILL" else ""
            return RanksFailedError(f"{who} was killed ({name}){cause}", words)
        if not failed:
            return RanksFailedError(f"not done after {patience:g} s (--timeout)", words)
        launch = self.ranks.launch
        who = f"rank {failed[0]}" if launch is None else shlex.split(launch)[0]
        return RanksFailedError(words[-1].strip() if words else f"{who} ended with code {self.codes[failed[0]]}", words)

    def _signal(self, code: int | None) -> str | None:
        """The name of the signal that a process, or under a command such as srun a rank, has ended by."""
        number = 0 if code is None else -code if code < 0 or self.ranks.launch is None else code - 128
        return signal.Signals(number).name if number in set(signal.Signals) else None


def await_all(programs: Sequence[Started], patience: float, stopped: Callable[[], bool]) -> None:
    """Wait until all have ended, or one has failed, or time is over; then none is left.

    Args:
        patience: seconds. stopped: asked again and again; once it is true, all are ended.
    """
    processes = [process for program in programs for process in program.processes]
    try:
        deadline = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and not stopped():
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_SECONDS)
        for program in programs:
            program.codes = [process.poll() for process in program.processes]
    finally:
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that run, with all that they have started: srun and launchers have 10 s to end theirs."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + 10
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
