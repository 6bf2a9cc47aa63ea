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

from parallel import departure
from parallel.departure import Word

HOW = "start with srun or torchrun"
_MOST_NAMED = 16
_MOMENT = 0.25  # seconds
_GRACE_SECONDS = 1.0  # for the others to read the verdict, before the store is gone; twice that for it to be told


class StartError(RuntimeError):
    """The ranks did not come together. told: another process tells. code: to end with."""

    def __init__(self, message: str, *, told: bool = False, code: int = 1) -> None:
        super().__init__(message)
        self.told, self.code = told, code


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


def meet(place: Place, timeout: float) -> tuple[dist.Store, int]:
    """(store, number of this try) once all ranks have come; the store shows no keys of other tries. After half of the
    time, at most 30 s, one line on stderr names those that have not come.

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
            say(f"rank {place.rank} of {place.size} is waiting for {meeting.missing}: {HOW}")
        meeting.join(max(0.0, meeting.deadline + 3 * _GRACE_SECONDS - time.monotonic()))
    if meeting.error is not None:
        raise meeting.error
    if meeting.is_alive() or meeting.store is None:
        raise meeting.too_late()
    return meeting.store, meeting.number


def open_store(place: Place, seconds: float) -> dist.Store:
    """Rank 0's, for it to leave word in. Raises StartError where it cannot listen there."""
    with _quiet_torch():
        return _listen(place, seconds)


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
        seeker.join(seconds + 3.0)  # torch has written by then that its time is over, on a busy machine, too
    return found[0] if found else None


class _Meeting(threading.Thread):
    """One rank's way to the others. store: once it is found. missing: who is waited for, as far as is known."""

    def __init__(
        self, place: Place, timeout: float, notice: float, deadline: float, say: Callable[[str], None]
    ) -> None:
        super().__init__(daemon=True)
        self.place, self.timeout, self.notice, self.deadline, self.say = place, timeout, notice, deadline, say
        self.store: dist.Store | None = None
        self.number = 0
        self.missing = f"rank 0 at {place}"
        self.error: StartError | None = None

    def run(self) -> None:
        try:
            store = _listen(self.place, self.timeout) if self.place.hosts else self._seek()
            if store is not None:
                self.store = dist.PrefixStore("vitruvius", store)
                if self.place.hosts:
                    departure.say_open(self.store)
                self.store = met = self._call_roll(self.store)
                self.number = met.number
        except StartError as error:
            self.error = error
        except RuntimeError as error:  # the store has ended
            self.missing = f"rank 0 at {self.place} ({str(error).partition(chr(10))[0]})"
            self.error = self.too_late()

    def too_late(self) -> StartError:
        """For want of a store, where ranks could agree on who tells, one on each host does."""
        return StartError(
            f"rank {self.place.rank} of {self.place.size} waited {self.timeout:g} s (parallel.timeout) for "
            f"{self.missing}: {HOW}, and see that MASTER_ADDR and MASTER_PORT are rank 0's",
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

    def _call_roll(self, store: dist.Store) -> _Round:
        """Wait until all have come; returns what is theirs alone of the store. Who sees that time is over ends it.

        The launcher's store outlives ranks that it starts again, and hosts do not count alike how often they were. So
        rank 0 begins a round, and only rank 0, which is alive then, closes it; a rank that waits in the round of
        another, who has ended since, goes to the next as soon as there is one.
        """
        first = self.place.rank == 0
        current, mine = (self._enter(store, store.add("rounds", 1)) if first else None), f"over {self.place.rank}"
        until, told = self.notice, False
        while (verdict := self._verdict(store, current)) is None:
            if (word := departure.left(store)) is not None:
                raise self._without(store, word)
            current = current if first else self._newest(store, current)
            if time.monotonic() < until:
                continue
            place = store if current is None or current.over else current
            if told:
                place.compare_set("verdict", "", mine)
                verdict = place.get("verdict").decode()
                break
            until, told = self.deadline, True
            if place.add("notice", 1) == 1:
                self.say(f"waiting for {self._absent(current)}: {HOW}")
        if verdict != "all":
            told, waited = verdict != mine, f"waited {self.timeout:g} s (parallel.timeout) for {self._absent(current)}"
            time.sleep(2 * _GRACE_SECONDS if told else _GRACE_SECONDS if self.place.hosts else 0.0)
            raise StartError(f"{waited}: {HOW}", told=told)
        assert current is not None
        return current

    def _enter(self, store: dist.Store, number: int) -> _Round | None:
        """Come to a round; None if it was another's, or is over."""
        entered = _Round(store, number)
        if entered.add(f"came/{self.place.rank}", 1) > 1 or entered.check(["verdict"]):
            return _Round(store, number, over=True)
        if entered.add("number", 1) == self.place.size:
            entered.set("full", "")
        return entered

    def _newest(self, store: dist.Store, current: _Round | None) -> _Round | None:
        """The round that this rank is in now."""
        number = int(store.get("rounds")) if store.check(["rounds"]) else 0
        return current if number == (current.number if current else 0) else self._enter(store, number)

    def _verdict(self, store: dist.Store, current: _Round | None) -> str | None:
        """Of the round, if it comes within a moment."""
        if current is None or current.over:
            _comes(store, "rounds" if current is None else "never")
            return None
        if self.place.rank == 0 and _comes(current, "full"):
            current.compare_set("verdict", "", "all")
        return current.get("verdict").decode() if _comes(current, "verdict") else None

    def _without(self, store: dist.Store, word: Word) -> StartError:
        """A rank has left."""
        what = f"rank {word.rank} of {self.place.size} has left before all ranks had come (exit code {word.code})"
        if not word.told and store.add("said", 1) == 1:
            self.say(what)
        departure.heed(store)
        if self.place.hosts:
            patience = min(departure.LINGER_SECONDS, self.deadline - time.monotonic())
            departure.await_all(store, self.place.size, patience)
        return StartError(what, told=True, code=word.code or 1)

    def _absent(self, current: _Round | None) -> str:
        size = self.place.size
        if current is None or current.over:
            return f"1 of {size} ranks (0)"  # the others cannot be seen without it
        ranks = [str(rank) for rank in range(size) if not current.check([f"came/{rank}"])]
        named = ", ".join(ranks[:_MOST_NAMED]) + (", ..." if len(ranks) > _MOST_NAMED else "")
        return f"{len(ranks)} of {size} ranks ({named})"


class _Round(dist.PrefixStore):
    """What belongs to one try of the ranks to come together. over: it was another's."""

    def __init__(self, store: dist.Store, number: int, *, over: bool = False) -> None:
        super().__init__(str(number), store)
        self.number, self.over = number, over


def _comes(store: dist.Store, key: str) -> bool:
    """Whether the key is there, within a moment."""
    try:
        store.wait([key], timedelta(seconds=_MOMENT))
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
