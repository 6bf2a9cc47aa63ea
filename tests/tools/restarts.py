"""Runs that are hit and go on: `python -m tests.tools.restarts` measures the time from a fault to the first new step.

The model is tiny, so what is measured is all the rest: to notice the fault, to end what is left, to start Python and
import torch, to meet, to read the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.distributed import free_port
from tests.engine.run.test_failures import ROOT, children, environment
from tests.engine.small import flags
from tests.hosts import Hosts, two_hosts

PATIENCE = 120.0  # seconds; a machine may be busy with other things
ELASTIC = ("--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-conf", "last_call_timeout=1", "--rdzv-id", "x")


class Job:
    """A run under launchers. Its folder is `run` in `folder`, beside what it says.

    Args:
        hosts: on which launchers may be started. changes: of flags.
    """

    def __init__(self, folder: Path, hosts: Hosts | None = None, **changes: str) -> None:
        self.hosts = hosts
        self.run_dir, self._out, self._launchers = folder / "run", folder / "out", list[subprocess.Popen[bytes]]()
        given = {"train__steps": "100000", "log__interval": "1", "checkpoint__save_interval": "5"}
        self._argv = flags(**given | {"run_dir": str(self.run_dir)} | changes)

    def start(
        self,
        *options: str,
        launcher: str = "tools.launch",
        script: str = "pretrain_vit.py",
        host: int | None = None,
    ) -> int:
        """Start a launcher of two ranks, or of one on one of the hosts; returns its number."""
        ranks = "2" if host is None else "1"
        argv = [sys.executable, "-m", launcher, "--nproc-per-node", ranks, *options, script, *self._argv]
        if host is not None:
            assert self.hosts is not None
            argv = self.hosts.on(host, argv)
        with self._out.open("ab") as out:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment(OMP_NUM_THREADS="1"),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._launchers.append(process)
        return len(self._launchers) - 1

    def said(self) -> str:
        """By all, from the beginning."""
        return self._out.read_text() if self._out.exists() else ""

    def ranks(self, launcher: int = 0) -> list[int]:
        """Processes of a launcher's ranks."""
        return children(self._launchers[launcher].pid)

    def signal(self, number: int, launcher: int = 0) -> None:
        """To a launcher."""
        self._launchers[launcher].send_signal(number)

    def lose(self, launcher: int) -> None:
        """A launcher and its ranks, as where a host fails."""
        ranks = self.ranks(launcher)
        self._launchers[launcher].kill()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self._launchers[launcher].wait()

    def code(self, launcher: int = 0) -> int:
        """With which a launcher ends."""
        return self._launchers[launcher].wait(PATIENCE)

    def trains(self, starts: int, steps: int = 7) -> None:
        """Return when ranks have started so many times, and have told of so many steps since."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            parts = self.said().split("Vitruvius: torch ")
            if len(parts) > starts and len(re.findall(r"\] step +\d+/", parts[starts])) >= steps:
                return
            time.sleep(0.02)
        raise AssertionError(f"no start {starts} that trains: {self.said()[-3000:]}")

    def await_said(self, what: str, times: int = 1) -> None:
        """Return when it has been, so often."""
        until = time.monotonic() + PATIENCE
        while self.said().count(what) < times:
            assert time.monotonic() < until, self.said()[-3000:]
            time.sleep(0.05)

    def resumed_at(self) -> list[int]:
        """Steps after which starts went on."""
        return [int(step) for step in re.findall(r"resume: from \S+, step (\d+) of", self.said())]

    def close(self) -> None:
        """Nothing is left."""
        for number, process in enumerate(self._launchers):
            if process.poll() is None:
                self.lose(number)


def rank_killed(job: Job, launcher: str) -> float:
    """A rank is killed; the launcher starts all again."""
    job.start("--max-restarts", "1", launcher=launcher)
    job.trains(1)
    began = time.monotonic()
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.trains(2, steps=1)
    return time.monotonic() - began


def started_again(job: Job, spoil: Callable[[Path], None] = lambda folder: None) -> float:
    """Launcher and ranks are killed, and the same command is given again."""
    first = job.start()
    job.trains(1, steps=12)
    began = time.monotonic()
    job.lose(first)
    spoil(max((job.run_dir / "checkpoints").glob("step-????????")))
    job.start()
    job.trains(2, steps=1)
    return time.monotonic() - began


def damage(checkpoint: Path) -> None:
    """A bit of it."""
    file = checkpoint / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def rank_hangs(job: Job) -> float:
    """A rank is stopped; the watchdog ends the run after 80 % of parallel.timeout, and the launcher starts it again."""
    job.start("--max-restarts", "1")
    job.trains(1)
    began = time.monotonic()
    os.kill(job.ranks()[1], signal.SIGSTOP)
    job.trains(2, steps=1)
    return time.monotonic() - began


def host_lost_and_back(job: Job) -> tuple[float, float]:
    """Of two hosts one is lost, and comes back. Two launchers train on return, the second of them number 2."""
    options = (*ELASTIC, "--rdzv-endpoint", f"localhost:{free_port()}", "--max-restarts", "3")
    job.start(*options)
    time.sleep(1.0)  # it has the store
    job.start(*options)
    job.trains(1)
    began = time.monotonic()
    job.lose(1)
    job.trains(2)
    lost, began = time.monotonic() - began, time.monotonic()
    job.start(*options)
    job.trains(3, steps=1)
    return lost, time.monotonic() - began


def link_cut_and_joined(job: Job) -> tuple[float, float]:
    """Between two hosts, of which the one with the store goes on; the other comes back when the link does."""
    with two_hosts() as job.hosts:
        options = (*ELASTIC, "--rdzv-endpoint", f"{job.hosts.addresses[0]}:29400", "--max-restarts", "3")
        for host in range(2):
            job.start(*options, host=host)
        both = "24 images = 2 data rank(s)"
        job.await_said(both)
        starts = job.said().count("Vitruvius: torch ")
        job.trains(starts)
        began = time.monotonic()
        job.hosts.cut()
        job.trains(starts + 1)
        lost, began = time.monotonic() - began, time.monotonic()
        job.hosts.join()
        job.await_said(both, times=2)  # the other may not take part in the very first start that it brings about
        job.trains(job.said().count("Vitruvius: torch "), steps=1)
        return lost, time.monotonic() - began


def main(argv: Sequence[str]) -> int:
    """Print the table, or the rows whose name holds the first argument."""
    rows: dict[str, tuple[Callable[[Job], float | tuple[float, float]], dict[str, str]]] = {
        "a rank killed, `tools.launch --max-restarts`": (lambda job: rank_killed(job, "tools.launch"), {}),
        "a rank killed, `torchrun --max-restarts`": (lambda job: rank_killed(job, "torch.distributed.run"), {}),
        "the launcher killed, the same command at once again": (started_again, {}),
        "so, and the newest checkpoint damaged": (lambda job: started_again(job, damage), {}),
        "a rank stopped, `parallel.timeout` 10": (rank_hangs, {"parallel__timeout": "10"}),
        "a host lost, and come back (elastic)": (
            host_lost_and_back,
            {"parallel__elastic": "true", "train__global_batch_size": "24"},
        ),
        "the link to a host cut, and joined when the others train (elastic), `parallel.timeout` 10": (
            link_cut_and_joined,
            {"parallel__elastic": "true", "train__global_batch_size": "24", "parallel__timeout": "10"},
        ),
    }
    for name, (measure, changes) in rows.items():
        if argv and argv[0] not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder), **changes)
            try:
                seconds = measure(job)
            finally:
                job.close()
        shown = ", ".join(f"{s:.1f} s" for s in ([seconds] if isinstance(seconds, float) else seconds))
        print(f"| {name} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
