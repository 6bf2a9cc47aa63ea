"""Processes that read ahead of the training loop, and how it learns that one is gone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from multiprocessing import active_children
from multiprocessing.connection import wait
from typing import TypeVar

from torch.utils.data import DataLoader

Item = TypeVar("Item")


class WorkerLostError(RuntimeError):
    """A process that reads images has ended before its time."""


def read_ahead(loader: DataLoader[Item]) -> Iterator[Item]:
    """What the worker processes of a loader read, in order.

    Raises:
        WorkerLostError: one has ended before its time.
    """
    others, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
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


def _ending(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with code {exitcode}"
    return f"was killed by signal {-exitcode} ({signal.strsignal(-exitcode)})"
