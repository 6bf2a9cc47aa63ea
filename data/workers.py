"""Processes that read ahead of the training loop, and how it learns that one is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from torch.utils.data import DataLoader

Item = TypeVar("Item")
STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}  # ask the training process to stop, and it alone
_PR_SET_PDEATHSIG = 1  # Linux


class WorkerLostError(RuntimeError):
    """A process that reads images has ended before its time."""


def read_ahead(loader: DataLoader[Item]) -> Iterator[Item]:
    """What the worker processes of a loader read, in order.

    Raises:
        WorkerLostError: one has ended before its time.
    """
    others, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
    with _signals_put_off():  # until each worker has its own way with them
        batches = iter(loader)
    # torch's handler raises wherever the program is, inside a collective or a message about an earlier error, as soon
    # as a worker is killed; without it that is an error where its batch is waited for, up to 5 seconds later.
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    workers = set(active_children()) - others
    try:
        yield from batches
    except Exception:  # of many types: a reset connection, a broken pickle, torch's own
        # One that ends closes its connections first, then its sentinel, and only then can be asked for its exit code.
        ending = wait([worker.sentinel for worker in workers], timeout=2)
        for worker in workers:
            if worker.sentinel in ending:
                worker.join()
        ended = [worker for worker in workers if worker.exitcode]
        if not ended:
            raise
        raise WorkerLostError(
            f"a data worker, process {ended[0].pid}, {_ending(ended[0].exitcode or 0)}: memory may have been short; "
            "lower data.workers, or see what the system says of that process"
        ) from None


def begin_worker(worker: int) -> None:
    """Called in a worker as it begins: it ends with its parent, and signals to stop are no matter of its own.

    Whoever stops a job may signal every process of it, and the training process, which finishes its step and saves,
    needs its workers until then. A thread takes the signals: one that waits in C++ or reads a file is reached, too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = parent_process()
        if parent is None or os.getppid() != parent.pid:
            os._exit(1)  # it ended before the kernel knew
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_heed_the_parent, args=(parent.pid,), daemon=True, name="signals").start()


def _heed_the_parent(parent: int) -> None:
    """Take signals, and end by SIGTERM of the parent alone: so torch ends workers that do not by themselves."""
    while True:
        taken = signal.sigwaitinfo(STOP_SIGNALS)  # type: ignore[attr-defined,unused-ignore]
        if taken.si_signo == signal.SIGTERM and taken.si_pid == parent:
            os._exit(0)


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Signals to stop reach this thread, and processes that it starts, after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with code {exitcode}"
    return f"was killed by signal {-exitcode} ({signal.strsignal(-exitcode)})"
