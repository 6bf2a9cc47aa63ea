"""Memory that processes of one host share, and waiting in it: what `host_channel` and the pipeline's lanes are made of.

Counters in it are 32-bit words, which x86 reads and writes whole and in order; waiting is spinning for a moment, if
every rank has a core of its own, then Linux's futex. A rank that waits looks twice a second whether the others live.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from parallel.failures import PeerLostError

LINE = 64
_SPIN_SECONDS = 1e-4
_SLICE_SECONDS = 0.5  # between looks whether the others live
_SYS_FUTEX, _WAIT, _WAKE = 202, 0, 1  # x86-64
_ALL = 1 << 30
_MASK = 0xFFFFFFFF
_TOKEN_BYTES = 16  # at the end of the memory


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_SLICE = ctypes.pointer(_Timespec(0, int(_SLICE_SECONDS * 1e9)))


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


def offer(nbytes: int, token: str) -> tuple[str, int]:
    """Make memory for several ranks: (where others open it, the file descriptor to keep until they have)."""
    fd = os.memfd_create("vitruvius")
    os.ftruncate(fd, nbytes + _TOKEN_BYTES)
    os.pwrite(fd, bytes.fromhex(token), nbytes)
    return f"/proc/{os.getpid()}/fd/{fd}", fd


class Memory:
    """The shared memory of an axis's ranks, as seen by one of them. Zeros at first; pages are taken when written to.

    Args:
        path: from `offer`. nbytes: as there. index: this rank's. pids: process numbers of all ranks, in order.
        timeout: seconds. token: that rank 0 has made up, to know the memory by. spins: whether to spin for a moment
            when waiting, which is for ranks that have a core each.

    Raises:
        OSError: the memory cannot be opened, or is another's: the ranks do not share a container's process numbers.
    """

    def __init__(
        self,
        path: str,
        nbytes: int,
        index: int,
        pids: Sequence[int],
        timeout: float,
        token: str,
        *,
        spins: bool = False,
    ) -> None:
        with Path(path).open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), nbytes + _TOKEN_BYTES)
        if self.map[nbytes:] != bytes.fromhex(token):
            raise OSError("the memory is not that of rank 0")
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.index, self.size, self.pids, self.timeout, self.spins = index, len(pids), tuple(pids), timeout, spins
        self.nbytes = nbytes
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def word(self, offset: int) -> ctypes.c_uint32:
        """A counter."""
        return ctypes.c_uint32.from_address(self.bytes.data_ptr() + offset)

    def wake(self, word: ctypes.c_uint32) -> None:
        """Whoever sleeps on a word that has changed."""
        self._syscall(_SYS_FUTEX, ctypes.byref(word), _WAKE, _ALL, None, None, 0)

    def sleep(self, word: ctypes.c_uint32, seen: int) -> None:
        """Until somebody wakes who sleeps on `word`, if that still is `seen`; half a second at most."""
        self._syscall(_SYS_FUTEX, ctypes.byref(word), _WAIT, seen, _SLICE, None, 0)

    def wait(self, look: Callable[[], int | None], word: ctypes.c_uint32, ranks: Iterable[int]) -> None:
        """Look again and again, asleep while `word` has the value that `look` returned, until it returns None.

        Args:
            ranks: of the axis, those that are waited for.

        Raises:
            PeerLostError: one of them has ended, or the time is over.
        """
        start = time.perf_counter()
        while (seen := look()) is not None:
            if self.spins and time.perf_counter() - start < _SPIN_SECONDS:
                continue
            self.sleep(word, seen)
            if (elapsed := time.perf_counter() - start) < _SLICE_SECONDS:
                continue
            for rank in ranks:
                if not lives(self.pids[rank]) and look() is not None:
                    raise PeerLostError(f"rank {rank} of the axis (process {self.pids[rank]}) has ended")
                if elapsed > self.timeout:
                    raise PeerLostError(f"rank {rank} of the axis did not come within {self.timeout:g} seconds")


def counted(value: int) -> int:
    """A count as a word holds it."""
    return value & _MASK


def reached(seen: int, value: int) -> bool:
    """Whether a counter that goes round at 2^32 is at `value` or past it."""
    return ((seen - value) & _MASK) < 1 << 31


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    status = process_status(pid)
    return bool(status) and status[0] not in "ZX"


def process_status(pid: int) -> list[str]:
    """What Linux says of a process after its name: its state first (proc(5)); nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
