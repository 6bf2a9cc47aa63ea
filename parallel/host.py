"""Collectives of CPU ranks on one host through shared memory: a copy in and a copy out, where gloo goes through TCP.

For the ranks of an axis that are processes of one host: 7 MB gathered by two ranks take 0.6 ms so, 8 ms by gloo.

Each rank has a few slots in memory that all of them map, and two counters: of the operations it has *deposited* its
data for, and of those it has *collected*. An operation deposits when it is started and collects when it is waited for,
so nobody waits for the others before he needs their data; a slot is used again when all have collected from it. What
does not fit into a slot is done in rounds while it is started. Both ways the rank that is farthest behind finds all it
needs, so nothing can lock up that would not lock up with any other transport. A slot begins with a label, which
operation it is for and how long that is: ranks that are at different ones get an error that names both.

Counters are 32-bit words, which x86 reads and writes whole and in order; waiting is spinning for a moment, if every
rank has a core of its own, then Linux's futex. A rank that waits looks twice a second whether the others still live.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.failures import MismatchError, PeerLostError

SLOT_BYTES = 4 << 20
SLOTS = 2
_LINE = 64
_SPIN_SECONDS = 1e-4
_SLICE_SECONDS = 0.5  # between looks whether the others live
_SYS_FUTEX, _WAIT, _WAKE = 202, 0, 1  # x86-64
_ALL = 1 << 30
_MASK = 0xFFFFFFFF
_TOKEN = slice(16, 32)  # bytes of the memory, between two counters

Collect = Callable[[Sequence[Tensor]], None]


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def is_supported() -> bool:
    """Whether this system has what is needed: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def identity() -> str:
    """Of this host, as long as it runs: its name and the number of its kernel's start, by which NCCL goes, too.

    The number alone is shared by what one kernel makes several hosts of (containers with names of their own, whose link
    is then what somebody wants to be used) and by copies of a virtual machine; a name alone, by hosts that all have
    the one they came with. What network a process is in does not matter: ranks of one name see each other's memory, or
    find out that they do not.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # another system, or a sandbox
        start = "unknown"
    return f"{socket.gethostname()} {start}"


def offer(size: int, token: str) -> tuple[str, int]:
    """Make memory for `size` ranks: (where others open it, the file descriptor to keep until they have)."""
    fd = os.memfd_create("vitruvius")
    os.ftruncate(fd, _bytes(size))
    os.pwrite(fd, bytes.fromhex(token), _TOKEN.start)
    return f"/proc/{os.getpid()}/fd/{fd}", fd


def _bytes(size: int) -> int:
    return size * (2 * _LINE + SLOTS * (_LINE + SLOT_BYTES))


class Channel:
    """One axis's shared memory, as seen by one rank.

    Args:
        path: from `offer`. index: this rank's. pids: process numbers of all ranks, in order. timeout: seconds.
        token: that rank 0 has made up, to know the memory by. spins: whether to spin for a moment when waiting, which
            is for ranks that have a core each.

    Raises:
        OSError: the memory cannot be opened, or is another's: the ranks do not share a container's process numbers.
    """

    def __init__(
        self, path: str, index: int, pids: Sequence[int], timeout: float, token: str, *, spins: bool = False
    ) -> None:
        size = len(pids)
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _bytes(size))
        if self._map[_TOKEN] != bytes.fromhex(token):
            raise OSError("the memory is not that of rank 0")
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self.index, self.size, self.pids, self.timeout, self._spins = index, size, tuple(pids), timeout, spins
        base = self.memory.data_ptr()
        self._deposited = [ctypes.c_uint32.from_address(base + 2 * r * _LINE) for r in range(size)]
        self._collected = [ctypes.c_uint32.from_address(base + (2 * r + 1) * _LINE) for r in range(size)]
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._next = 0
        self._started: deque[Operation] = deque()

    def slot(self, rank: int, number: int) -> Tensor:
        """The bytes in which `rank` deposits for operation `number`."""
        start = self._label(rank, number).stop
        return self.memory[start : start + SLOT_BYTES]

    def _label(self, rank: int, number: int) -> slice:
        """Where in the memory `rank` says what its operation `number` is."""
        start = self.size * 2 * _LINE + (rank * SLOTS + number % SLOTS) * (_LINE + SLOT_BYTES)
        return slice(start, start + _LINE)

    def start(self, what: str, deposit: Callable[[Tensor], object], collect: Collect) -> Operation:
        """Deposit now, collect later.

        Args:
            what: operation and length, the same on all ranks. deposit: fills this rank's slot (bytes). collect: reads
            the slots of all ranks, in order of index.
        """
        while len(self._started) >= SLOTS:
            self._started[0].wait()
        number = self._next
        self._next += 1
        for rank in range(self.size):
            if rank != self.index:
                self._await(self._collected[rank], number - SLOTS + 1, rank)
        operation = Operation(self, number, what, collect)
        self._map[self._label(self.index, number)] = operation.label
        deposit(self.slot(self.index, number))
        self._post(self._deposited[self.index], number + 1)
        self._started.append(operation)
        return operation

    def finish(self, operation: Operation) -> None:
        """Collect for this operation, and for those before it."""
        while self._started:
            oldest = self._started[0]
            for rank in range(self.size):
                if rank != self.index:
                    self._await(self._deposited[rank], oldest.number + 1, rank)
                    self._compare(oldest, rank)
            oldest.collect([self.slot(rank, oldest.number) for rank in range(self.size)])
            oldest.done = True
            self._started.popleft()
            self._post(self._collected[self.index], oldest.number + 1)
            if oldest is operation:
                return

    def _compare(self, operation: Operation, rank: int) -> None:
        theirs = self._map[self._label(rank, operation.number)]
        if theirs != operation.label:
            raise MismatchError(
                f"rank {self.index} of the axis is at {_text(operation.label)}, rank {rank} at {_text(theirs)}"
            )

    def has_arrived(self, operation: Operation) -> bool:
        """Whether finishing it would not have to wait."""
        return all(_reached(word.value, operation.number + 1) for word in self._deposited)

    def _post(self, word: ctypes.c_uint32, value: int) -> None:
        word.value = value & _MASK
        self._syscall(_SYS_FUTEX, ctypes.byref(word), _WAKE, _ALL, None, None, 0)

    def _await(self, word: ctypes.c_uint32, value: int, rank: int) -> None:
        """Return when the counter has come to `value`."""
        start = time.perf_counter()
        while not _reached(seen := word.value, value):
            elapsed = time.perf_counter() - start
            if self._spins and elapsed < _SPIN_SECONDS:
                continue
            pause = _Timespec(0, int(_SLICE_SECONDS * 1e9))
            self._syscall(_SYS_FUTEX, ctypes.byref(word), _WAIT, seen, ctypes.byref(pause), None, 0)
            if elapsed > _SLICE_SECONDS and not _lives(self.pids[rank]) and not _reached(word.value, value):
                raise PeerLostError(f"rank {rank} of the axis (process {self.pids[rank]}) has ended")
            if elapsed > self.timeout:
                raise PeerLostError(f"rank {rank} of the axis did not come within {self.timeout:g} seconds")


class Operation:
    """Something started. The engine's comm treats it as it does torch's work handles."""

    def __init__(self, channel: Channel, number: int, what: str, collect: Collect) -> None:
        self.channel, self.number, self.collect, self.done = channel, number, collect, False
        self.label = what.encode().ljust(_LINE, b"\0")[:_LINE]

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self.done or self.channel.has_arrived(self)

    def wait(self) -> None:
        """Return when the result is there. Raises PeerLostError if another rank is gone, or late,
        MismatchError if it is at something else.
        """
        if not self.done:
            self.channel.finish(self)


def _text(label: bytes) -> str:
    return label.rstrip(b"\0").decode(errors="replace")


def _reached(seen: int, value: int) -> bool:
    """Whether a counter that goes round at 2^32 is at `value` or past it."""
    return ((seen - value) & _MASK) < 1 << 31


def _lives(pid: int) -> bool:
    status = process_status(pid)
    return bool(status) and status[0] not in "ZX"


def process_status(pid: int) -> list[str]:
    """What Linux says of a process after its name: its state first (proc(5)); nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
