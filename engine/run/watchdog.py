"""Ends a run that hangs, and tells which rank hangs, at what, since when. `docs/runs.md` tells it to users.

A thread of each rank looks at what its rank has written down (parallel.heartbeat) and says so in the store. A rank that
has not moved for too long accuses: all ranks write the stacks of their threads, and say for the last time where they
are. Who does not answer is stopped, or gone. The first to accuse tells, and all leave.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from engine.errors import EXIT_FAULT
from engine.run.agreement import named_ranks
from engine.run.launch import note_for_torchrun
from parallel import process_group
from parallel.grid import Grid
from parallel.heartbeat import Attempt, Sign, Signs, Whereabouts
from parallel.host import identity, process_status
from parallel.process_group import World

_SHARE = 0.8  # of parallel.timeout, after which ranks that wait end with an error that knows less
_IDLE = 0.1  # of a core
_BUSY_FACTOR = 10  # the patience with a rank that computes, and that nobody is known to wait for
_MOST_NAMED = 8
_NO_STORE = (
    "no store answers, so rank 0's process is stopped (or its launcher's), or its host or the link to it is down"
)


class Watchdog(threading.Thread):
    """Watches this rank, and with those of the others the run.

    Args:
        where: what the rank is at. timeout: `parallel.timeout`. run_dir: gets a folder `hang` with stacks of threads.
        spins: whether a thread that waits for the device uses a core, as on CUDA: it is not taken for one at work.
    """

    def __init__(self, where: Whereabouts, world: World, *, timeout: float, run_dir: Path, spins: bool = False) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.where, self.world, self.run_dir, self.spins = where, world, run_dir, spins
        self.limit = _SHARE * timeout
        self.interval = min(5.0, self.limit / 20)
        self.patience = max(1.0, 3 * self.interval)  # with threads of other ranks
        self._over = threading.Event()
        self._still = _Still(where)
        self._signs = process_group.signs(world, self.patience)
        if self._signs is not None:
            self._signs.beat(self._sign())  # so that all are known before one can hang

    def run(self) -> None:
        """Called by the thread."""
        while not self._over.wait(self.interval):
            self._still.look(most=2 * self.interval)
            hung = self._signs is not None and self._signs.beat(self._sign())
            if hung or self._is_stuck():
                self._end()

    def close(self) -> None:
        """The rank has done its work."""
        self._over.set()
        self.join(3 * self.patience)

    def _is_stuck(self) -> bool:
        still = self._still
        at_work = not self.spins and self.where.waiting is None and still.processor_share >= _IDLE
        return still.seconds >= (_BUSY_FACTOR * self.limit if at_work else self.limit)

    def _sign(self) -> Sign:
        where = self.where
        return Sign(
            host=socket.gethostname(), machine=identity(), pid=os.getpid(), place=where.place,
            wait=where.wait, still=self._still.seconds, written=time.time(),
        )  # fmt: skip

    def _end(self) -> None:
        """All that is to be done in a run that hangs; does not return."""
        threading.Timer(10 * self.patience, os._exit, (EXIT_FAULT,)).start()  # whatever becomes of the rest
        signs, world = self._signs, self.world
        is_first = signs is not None and signs.accuse()
        if signs is None or not signs.is_closed():  # else this process was stopped, and the others have left
            sign = self._sign()
            sign = replace(sign, stacks=self._dump(sign))
            if signs is not None:
                signs.answer(sign)
            if signs is None or not signs.answers:
                if world.size == 1 or process_group.first_here_to_report("hang", world):
                    _tell(alone(sign, world))
            elif is_first:
                self._tell_verdict(signs)
            else:
                self._wait(5, lambda: signs.is_closed() or not signs.answers)
        if world.rank == 0 and signs is not None:
            time.sleep(1.0)  # the store may be this process's: the others read it to the end
        for child in multiprocessing.active_children():  # which read images
            child.kill()
        os._exit(EXIT_FAULT)

    def _tell_verdict(self, signs: Signs) -> None:
        self._wait(2, lambda: signs.answered() == self.world.size)
        here, lost = signs.collect()
        states = {rank: _state(sign) for rank, sign in lost.items()}
        first = Attempt(lambda: process_group.first_to_report("end", self.world), self.patience)
        if first.answers != [False]:
            _tell(verdict(here, lost, states))
        signs.close()
        for rank, state in states.items():
            if state == "stopped":  # a launcher's SIGTERM waits until it goes on, and its own watchdog ends it then
                with contextlib.suppress(OSError):
                    os.kill(lost[rank].pid, signal.SIGCONT)

    def _wait(self, patiences: int, done: Callable[[], bool]) -> None:
        """Until it is done, but not for ever."""
        deadline = time.monotonic() + patiences * self.patience
        while time.monotonic() < deadline and not done():
            time.sleep(self.interval / 4)

    def _dump(self, sign: Sign) -> str | None:
        """Stacks of all threads, in the run's folder, or, where that hangs itself, in the host's; returns the file."""
        name = f"rank-{self.world.rank:05}.txt"
        head = f"{time.ctime()}: rank {self.world.rank}, process {sign.pid} on {sign.host}, {_at(sign)}\n"
        written = Attempt(lambda: _write_stacks(self.run_dir / "hang" / name, head), self.patience).answers
        if not written:
            written = Attempt(
                lambda: _write_stacks(Path(tempfile.mkdtemp(prefix="vitruvius-hang-")) / name, head), self.patience
            ).answers
        return str(written[0]) if written else None


class _Still:
    """How long a rank has not moved, by the looks at it: while this process was stopped nothing counts.

    Attributes:
        seconds: since it moved.
    """

    def __init__(self, where: Whereabouts) -> None:
        self._where = where
        self.seconds, self._moves = 0.0, where.moves
        self._looked, self._processor = time.monotonic(), time.process_time()

    def look(self, most: float) -> None:
        """Now. most: seconds that can have passed since the last look."""
        now = time.monotonic()
        if self._where.moves != self._moves:
            self.seconds, self._moves, self._processor = 0.0, self._where.moves, time.process_time()
        else:
            self.seconds += min(most, now - self._looked)
        self._looked = now

    @property
    def processor_share(self) -> float:
        """Of a core, that this process has used since."""
        return (time.process_time() - self._processor) / max(self.seconds, 1e-9)


@contextlib.contextmanager
def watched(grid: Grid, world: World, device: torch.device, run_dir: Path) -> Iterator[None]:
    """Within, the run is ended if it hangs."""
    spins = device.type == "cuda"
    watchdog = Watchdog(grid.meter.where, world, timeout=grid.timeout, run_dir=run_dir, spins=spins)
    watchdog.start()
    is_over = world.size == 1  # however it ends; of several ranks, one that fails is asked by others until it leaves
    try:
        yield
        is_over = True
    finally:
        if is_over:
            watchdog.close()


def alone(sign: Sign, world: World) -> str:
    """The message of a rank that can ask no other: it is the only one, or there is no store that answers."""
    missing = f"; {_NO_STORE}" if world.size > 1 else ""
    return f"the run hangs: {_line(world.rank, sign, None)}{missing}\nstacks: {_stacks([sign.stacks])}"


def verdict(here: Mapping[int, Sign], lost: Mapping[int, Sign], states: Mapping[int, str]) -> str:
    """Who hangs: those that give no sign of life, else those that wait for nobody, else all, who wait for each other.

    Args:
        here: last words of ranks that can speak. lost: last signs of those that cannot. states: of their processes.
    """
    at_work = {rank: sign for rank, sign in here.items() if sign.wait is None}
    blamed = lost or at_work or here
    lines = [_line(rank, sign, states.get(rank)) for rank, sign in sorted(blamed.items())[:_MOST_NAMED]]
    if len(blamed) > _MOST_NAMED:
        lines.append(f"and {len(blamed) - _MOST_NAMED} more ranks")
    waiting = defaultdict(list)
    for rank, sign in sorted(here.items()):
        if rank not in blamed:
            waiting[sign.wait or "no collective"].append(rank)
    lines += [f"{named_ranks(ranks)} {'wait' if ranks[1:] else 'waits'} in {wait}" for wait, ranks in waiting.items()]
    head = "all ranks wait for each other: " if blamed is here else ""
    unwritten = [rank for rank, sign in (*here.items(), *lost.items()) if sign.stacks is None]
    stacks = _stacks([sign.stacks for sign in here.values()])
    return f"the run hangs: {head}{'; '.join(lines)}\nstacks: {stacks}" + (
        f"; none of {named_ranks(sorted(unwritten))}" if unwritten else ""
    )


def _tell(message: str) -> None:
    """Write at once: a thread that hangs may hold the lock of sys.stderr."""
    message = f"{Path(sys.argv[0]).name}: {message}"
    note_for_torchrun(message)
    os.write(2, f"{message}\n".encode())


def _write_stacks(path: Path, head: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(head)
        file.flush()
        faulthandler.dump_traceback(file)
    return path


def _line(rank: int, sign: Sign, state: str | None) -> str:
    if state is None:
        return f"rank {rank} is {_at(sign)}, for {sign.still:.0f} s"
    since = time.strftime("%H:%M:%S", time.localtime(sign.written))
    return (
        f"rank {rank} (process {sign.pid} on {sign.host}, {state}) gives no sign since {since}, when it was {_at(sign)}"
    )


def _at(sign: Sign) -> str:
    return f"at {sign.place}" + (f", in {sign.wait}" if sign.wait else "")


def _stacks(files: list[str | None]) -> str:
    """The folder of several, else the file."""
    written = [file for file in files if file is not None]
    folders = sorted({str(Path(file).parent) for file in written})
    return written[0] if len(written) == 1 else ", ".join(folders[:_MOST_NAMED]) or "could not be written"


def _state(sign: Sign) -> str:
    """Of a rank's process, as far as can be seen from here."""
    if sign.machine != identity():
        return "on another host"
    letter, *_ = process_status(sign.pid) or [""]
    known = {"": "gone", "T": "stopped", "t": "stopped", "D": "in the kernel", "Z": "ended"}
    return known.get(letter, "running")
