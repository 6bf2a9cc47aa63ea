"""How ranks find each other: rank 0's (or the launcher's) key-value store, and a roll call before any group is made.

torch waits for a rank that never comes with pages of text, and without end for a program that has taken the port, or a
stopped process, that says nothing. So a thread goes to meet the others, and the main thread keeps the time: one line
tells who is waited for, and another ends the wait.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_HOW = "start with srun or torchrun"
_MOST_NAMED = 16
_GRACE_SECONDS = 1.0  # for the others to read the verdict, before the store is gone; twice that for it to be told


class StartError(RuntimeError):
    """The ranks did not come together. told: another process tells."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where ranks meet, and which of `size` this one is. hosts: it has the store. run: tells this run's keys from
    another's.
    """

    host: str
    port: int
    rank: int
    size: int
    hosts: bool
    run: str = "0"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def meet(place: Place, timeout: float) -> dist.Store:
    """The store, once all ranks have come. After half of the time, at most 30 s, one line on stderr names those that
    have not.

    Args:
        timeout: seconds.

    Raises:
        StartError: ranks have not come in time; or the port is another program's.
    """
    now = time.monotonic()
    with _quiet_torch() as say:
        meeting = _Meeting(place, timeout, now + min(30.0, timeout / 2), now + timeout, say)
        meeting.start()
        meeting.join(meeting.notice - now)
        if meeting.is_alive() and meeting.store is None and first_on_host(place):
            say(f"rank {place.rank} of {place.size} is waiting for {meeting.missing}: {_HOW}")
        meeting.join(max(0.0, meeting.deadline + 3 * _GRACE_SECONDS - time.monotonic()))
    if meeting.error is not None:
        raise meeting.error
    if meeting.is_alive() or meeting.store is None:
        raise meeting.too_late()
    return meeting.store


def find_store(host: str, port: int, seconds: float) -> dist.Store | None:
    """Another process's store, if one answers in time."""
    found: list[dist.Store] = []

    def seek() -> None:
        deadline = time.monotonic() + seconds
        while not found and time.monotonic() < deadline:
            with contextlib.suppress(OSError, RuntimeError):
                found.append(_connect(host, port, seconds))
                return
            time.sleep(0.2)

    with _quiet_torch():
        seeker = threading.Thread(target=seek, daemon=True)
        seeker.start()
        seeker.join(seconds)
    return found[0] if found else None


class _Meeting(threading.Thread):
    """One rank's way to the others. store: once it is found. missing: who is waited for, as far as is known."""

    def __init__(
        self, place: Place, timeout: float, notice: float, deadline: float, say: Callable[[str], None]
    ) -> None:
        super().__init__(daemon=True)
        self.place, self.timeout, self.notice, self.deadline, self.say = place, timeout, notice, deadline, say
        self.store: dist.Store | None = None
        self.missing = f"rank 0 at {place}"
        self.error: StartError | None = None

    def run(self) -> None:
        try:
            store = _listen(self.place, self.timeout) if self.place.hosts else self._seek()
            if store is not None:
                self.store = dist.PrefixStore(f"vitruvius/{self.place.run}", store)
                self._call_roll(self.store)
        except StartError as error:
            self.error = error
        except RuntimeError as error:  # the store has ended
            self.missing = f"rank 0 at {self.place} ({str(error).partition(chr(10))[0]})"
            self.error = self.too_late()

    def too_late(self) -> StartError:
        """For want of a store, where ranks could agree on who tells, one on each host does."""
        return StartError(
            f"rank {self.place.rank} of {self.place.size} waited {self.timeout:g} s (parallel.timeout) for "
            f"{self.missing}: {_HOW}, and see that MASTER_ADDR and MASTER_PORT are rank 0's",
            told=first_on_host(self.place) is None,
        )

    def _seek(self) -> dist.TCPStore | None:
        pause = 0.01
        while time.monotonic() < self.deadline:
            try:
                socket.create_connection((self.place.host, self.place.port), timeout=5).close()
                self.missing = f"rank 0 at {self.place} (another program, or a stopped one, listens there)"
                return _connect(self.place.host, self.place.port, self.timeout)
            except OSError as error:
                self.missing = f"rank 0 at {self.place} ({error.strerror or error})"
            except RuntimeError:  # it listens, and is no store
                pass
            time.sleep(pause)
            pause = min(0.25, 1.1 * pause)
        return None

    def _call_roll(self, store: dist.Store) -> None:
        """Wait until all have come. The first to see that they have, or that time is over, decides it for all."""
        store.set(f"came/{self.place.rank}", "")
        mine = f"over {self.place.rank}"
        if store.add("number", 1) == self.place.size:
            store.compare_set("verdict", "", "all")
        if not _comes(store, self.notice):
            if store.add("notice", 1) == 1:
                self.say(f"waiting for {self._absent(store)}: {_HOW}")
            if not _comes(store, self.deadline):
                store.compare_set("verdict", "", mine)
        verdict = store.get("verdict").decode()
        if verdict != "all":
            told, waited = verdict != mine, f"waited {self.timeout:g} s (parallel.timeout) for {self._absent(store)}"
            time.sleep(2 * _GRACE_SECONDS if told else _GRACE_SECONDS if self.place.hosts else 0.0)
            raise StartError(f"{waited}: {_HOW}", told=told)

    def _absent(self, store: dist.Store) -> str:
        size = self.place.size
        ranks = [str(rank) for rank in range(size) if not store.check([f"came/{rank}"])]
        named = ", ".join(ranks[:_MOST_NAMED]) + (", ..." if len(ranks) > _MOST_NAMED else "")
        return f"{len(ranks)} of {size} ranks ({named})"


def _comes(store: dist.Store, until: float) -> bool:
    """Whether there is a verdict in time."""
    try:
        store.wait(["verdict"], timedelta(seconds=max(0.01, until - time.monotonic())))
    except dist.DistStoreError:
        return False
    return True


def _connect(host: str, port: int, seconds: float) -> dist.TCPStore:
    socket.create_connection((host, port), timeout=1).close()  # the store itself complains at length
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)


def _listen(place: Place, seconds: float) -> dist.TCPStore:
    """Rank 0's own store, which listens on the master address alone where that is an address of this host."""
    listener = None
    with contextlib.suppress(OSError):
        listener = _bind(place)
    try:
        return dist.TCPStore(
            place.host,
            place.port,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (RuntimeError, ValueError) as error:
        reason = "another program listens there" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        raise StartError(f"rank 0 cannot listen on {place} ({reason}): set MASTER_PORT to a free port") from None


def _bind(place: Place) -> socket.socket:
    """Raises OSError where that cannot be, or other hosts know this one by another address than /etc/hosts does."""
    family, kind, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
    if str(address[0]).startswith("127.") and place.host not in (address[0], "localhost"):
        raise OSError
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


@functools.cache  # which keeps it, for as long as the process lives
def first_on_host(place: Place) -> socket.socket | None:
    """Something that only the first process of this host that asks can have."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0vitruvius {place} {place.run}")  # no file: a name in the kernel
    except OSError:
        claim.close()
        return None
    return claim


@contextlib.contextmanager
def _quiet_torch() -> Iterator[Callable[[str], None]]:
    """Keep pages away that torch's C++ writes about every try to connect. Gives what writes a line all the same."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield lambda message: _write(kept, message)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _write(descriptor: int, message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{message}\n".encode())
