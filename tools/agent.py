"""torchrun's agent, which looks after the ranks of one host, with our ways to stop them and to start them again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from engine.errors import EXIT_STOPPED, FINAL

_LEFT_OVER_SECONDS = 30
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
            super()._shutdown(death_sig, 0 if self._hurried else timeout)
        except SignalException:
            self._hurried = True  # the second: `run` calls this again before it ends
            raise

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Ranks that are well save (torch gives them 30 s); those that are left after a failure cannot."""
        well = worker_group.state is WorkerState.HEALTHY
        self._shutdown(timeout=self._shutdown_timeout if well else min(self._shutdown_timeout, _LEFT_OVER_SECONDS))


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
