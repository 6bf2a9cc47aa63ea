"""torchrun's agent, which looks after the ranks of one host, with our ways to stop them and to start them again."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from engine.errors import EXIT_STOPPED, FINAL
from parallel import parent

_LEFT_OVER_SECONDS = 30
_BEGINNING_SECONDS = 30  # until a rank's program heeds a warning if it ever does
_INTERRUPTED = 128 + signal.SIGINT


class Stopped(SignalException):
    """A signal has ended the agent. codes: what its ranks ended with; None: one had not ended."""

    def __init__(self, error: SignalException, codes: Collection[int | None]) -> None:
        super().__init__(str(error), error.sigval)
        self.codes = codes


class Agent(LocalElasticAgent):
    """Passes signals on and waits until ranks have saved; starts ranks again where that can help, and says so."""

    say: Callable[[str], None] = staticmethod(print)
    _hurried = False
    _started = 0.0

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """See there. Raises Stopped."""
        try:
            return super().run(role)
        except SignalException as error:
            raise Stopped(error, [None] if self._hurried else self._codes()) from None

    def _codes(self) -> list[int | None]:
        """Of each rank of this host; None also for those that torch was just starting, and does not know of."""
        handlers: dict[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        return [
            handlers[rank].proc.poll() if rank in handlers else None
            for rank in range(self._worker_group.spec.local_world_size)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with _signals_put_off():
            started = super()._start_workers(worker_group)
            self._started = time.monotonic()
        return started

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Have hosts that come later told where ranks meet: torch 2.13 tells it once, and they wait in vain."""
        handler = worker_group.spec.rdzv_handler
        if hasattr(handler, "_bootstrap_store_info"):
            handler._bootstrap_store_info = None
        super()._rendezvous(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            rank, failure = first_failure(result.failures)
            self._why = ending(rank, failure) or f"rank {rank} ended with code {failure.exitcode}"
            if failure.exitcode == EXIT_STOPPED and self._others_wait():
                return RunResult(state=WorkerState.HEALTHY)  # another host's agent has stopped them, to let a host in
            if failure.exitcode in FINAL:
                self._remaining_restarts = 0
        return result

    def _others_wait(self) -> bool:
        """Whether hosts wait to take part: those that have stopped their ranks to let one in, and that one."""
        with suppress(Exception):  # the host with the store may be gone
            return bool(self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0)
        return False

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY:
            self.say("other hosts have come: all ranks save, and start again")
        else:
            most = worker_group.spec.max_restarts
            self.say(f"{self._why}: all ranks start again (restart {most - self._remaining_restarts} of {most})")
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        try:
            if death_sig == signal.SIGUSR1 and not self._hurried:
                self._wait_until_heeded(death_sig)
            super()._shutdown(death_sig, 0 if self._hurried else timeout)
        except SignalException:
            self._hurried = True  # the second: `run` calls this again before it ends
            raise

    def _wait_until_heeded(self, number: signal.Signals) -> None:
        """A rank that has just been started would be killed by what it is about to heed."""
        handlers: dict[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        while time.monotonic() < self._started + _BEGINNING_SECONDS:
            if all(one.proc.poll() is not None or _heeds(one.proc.pid, number) for one in handlers.values()):
                return
            time.sleep(0.02)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Ranks that are well save (torch gives them 30 s); those that are left after a failure cannot."""
        well = worker_group.state is WorkerState.HEALTHY
        self._shutdown(timeout=self._shutdown_timeout if well else min(self._shutdown_timeout, _LEFT_OVER_SECONDS))


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Signals to stop that come within, or have waited for it, are raised at its end. Interrupted as it starts ranks,
    torch forgets those that there are, and they would be killed instead of told.
    """
    came, handler = list[int](), processes._terminate_process_handler
    heeded = [signal.Signals[name] for name in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"].split(",") if name]

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    processes._terminate_process_handler = note  # which torch has them call
    try:
        for number in heeded:
            signal.signal(number, note)
        parent.let_warnings_come()  # ranks that are started with a mask would keep it
        yield
    finally:
        processes._terminate_process_handler = handler
        for number in heeded:
            signal.signal(number, handler)
    if came:
        handler(came[0], None)


def _heeds(pid: int, number: int) -> bool:
    """Whether a signal would not end a process: it has a handler, or ignores it, or has it wait."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended, or there is no such file system
        return True
    masks = re.findall(r"^Sig(?:Blk|Ign|Cgt):\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> number - 1 & 1 for mask in masks)


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """(rank, failure) of the rank that failed first."""
    rank = min(failures, key=lambda rank: failures[rank].timestamp)
    return rank, failures[rank]


def ending(rank: int, failure: ProcessFailure) -> str:
    """How a rank ended that could not tell itself; empty where it could."""
    code = failure.exitcode
    if code < 0:
        return f"rank {rank} was killed by signal {-code} ({failure.signal_name()})"
    # of its own accord it keeps quiet, as where all ranks and the launcher are interrupted
    return f"rank {rank} was interrupted" if code == _INTERRUPTED else ""
