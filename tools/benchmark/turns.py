"""Programs that take turns: each in processes of its own, all but one of them blocked in a read from a socket.

The coordinator's end. A program is started once per rank; every process sends a first message when it is ready to
train, and then answers each message with one of its own. What a process waits for costs it no CPU time, which it
measures and reports (`peer_programs.serve` is the other end).
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

Answer = dict[str, Any]

_ROOT = Path(__file__).parents[2]
_STARTING_SECONDS = 900.0  # a peer may compile kernels of its own at its first start
_STEP_SECONDS = 900.0
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProgramFailedError(RuntimeError):
    """A program could not be started, or ended before its time. The message has the last lines it wrote."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to start.

    Attributes:
        name: in the table. interpreter: the Python of its environment. module: to run with -m; its argument is the
            number of the socket. ranks: processes. threads: of each. task: its first message, plain values only.
        environment: variables beside those that every program gets.
    """

    name: str
    interpreter: str
    module: str
    ranks: int
    threads: int
    task: Mapping[str, Any]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Running:
    """A started program: a process and a socket per rank."""

    program: Program
    processes: list[subprocess.Popen[bytes]]
    sockets: list[Connection]
    logs: list[Path]

    def ask(self, message: Answer) -> list[Answer]:
        """Send every rank `message`; returns their answers, in order of rank, when the last has come."""
        self.send(message)
        return self.collect()

    def send(self, message: Answer) -> None:
        """To every rank. One that is gone is told of when its answer does not come."""
        for end in self.sockets:
            with suppress(ConnectionError):
                end.send(message)

    def collect(self, patience: float = _STEP_SECONDS) -> list[Answer]:
        """One answer of every rank, in order of rank, waiting at most `patience` seconds for each."""
        answers: dict[int, Answer] = {}
        while len(answers) < len(self.sockets):
            waiting = {id(end): rank for rank, end in enumerate(self.sockets) if rank not in answers}
            ready = wait([self.sockets[rank] for rank in waiting.values()], patience)
            if not ready:
                raise ProgramFailedError(f"{self.program.name}: no answer within {patience:.0f} s{self._last_words(0)}")
            for rank in (waiting[id(end)] for end in ready):
                answers[rank] = self._receive(rank)
        return [answers[rank] for rank in range(len(self.sockets))]

    def _receive(self, rank: int) -> Answer:
        try:
            answer: Answer = self.sockets[rank].recv()
        except (EOFError, ConnectionError) as error:
            code = self.processes[rank].wait()
            raise ProgramFailedError(
                f"{self.program.name}: rank {rank} ended with code {code}{self._last_words(rank)}"
            ) from error
        return answer

    def _last_words(self, rank: int) -> str:
        lines = self.logs[rank].read_text(errors="replace").splitlines()[-12:]
        return "\n  ".join(["; the last it wrote:", *lines]) if lines else ""

    def stop(self) -> None:
        """End its processes: those that still listen leave by themselves."""
        for end in self.sockets:
            end.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def started(programs: Sequence[Program], folder: Path) -> Iterator[list[Running]]:
    """All programs, ready to step; what they write goes to files in `folder`."""
    with ExitStack() as stack:
        running = [_start(program, folder, stack) for program in programs]
        for one in running:
            one.send(dict(one.program.task))
        for one in running:
            one.collect(_STARTING_SECONDS)
        yield running


def _start(program: Program, folder: Path, stack: ExitStack) -> Running:
    one = Running(program, [], [], [folder / f"{program.name}.{rank}.log" for rank in range(program.ranks)])
    stack.callback(one.stop)
    port = free_port()
    for rank, log in enumerate(one.logs):
        ours, theirs = Pipe()
        with log.open("wb") as file, theirs:
            one.processes.append(
                subprocess.Popen(
                    [program.interpreter, "-m", program.module, str(theirs.fileno())],
                    env=rank_environment(rank, program.ranks, port, program.threads) | dict(program.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    pass_fds=[theirs.fileno()],
                )
            )
        one.sockets.append(ours)
    return one


def rank_environment(rank: int, ranks: int, port: int, threads: int, root: Path = _ROOT) -> dict[str, str]:
    """Of one of `ranks` processes of this host that meet at `port`, and import what is in `root`; no launcher's."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    here = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    return {**inherited, **here, **world, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
