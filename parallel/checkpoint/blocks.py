"""A new file, written from its beginning to its end, in blocks that go past the page cache.

The disk then takes them straight from our memory: no copy by the kernel, no pages of other files pushed out, nothing
left for fsync to write. `docs/checkpoints.md` has the figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 20
THREADS = 2  # that write
_FLUSHED_BYTES = 256 << 20  # so many wait in the page cache at most, where the file system knows no other way
_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockFile:
    """A context manager. Blocks are written by threads while the next is filled; only `sync` tells of all of them.

    Args:
        path: of a file that does not exist yet. size: that it will have, so that the disk can give it one place.
        on_disk: called by threads, with the bytes that the disk has taken since.

    Raises:
        OSError: from every method, also of blocks before: as of a full disk.
    """

    def __init__(self, path: Path, size: int, on_disk: Callable[[int], None] = lambda count: None) -> None:
        self._rooms = [np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8) for _ in range(THREADS + 1)]  # pages
        self._filled = self._written = 0
        self._on_disk, self._direct = on_disk, False
        self._writing: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, "checkpoint")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # not every file system can
            self._set_direct(True)
        if size and (allocate := getattr(ctypes.CDLL(None), "fallocate", None)) is not None:  # Linux
            allocate(ctypes.c_int(self._file), 0, ctypes.c_int64(0), ctypes.c_int64(size))  # where it cannot, no harm

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        os.close(self._file)

    @property
    def size(self) -> int:
        """Bytes that it was given."""
        return self._written + self._filled

    def write(self, data: NDArray[np.uint8]) -> None:
        """Append bytes."""
        while len(data):
            count = min(len(data), BLOCK_BYTES - self._filled)
            np.copyto(self._rooms[0][self._filled : self._filled + count], data[:count])
            self._filled += count
            data = data[count:]
            if self._filled == BLOCK_BYTES:
                self._start_block()

    def sync(self) -> None:
        """Return when all of it is on the disk; nothing can follow."""
        size = self.size
        self._filled = -(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE  # only pages can be written so
        self._start_block()
        while self._writing:
            self._writing.popleft().result()
        os.ftruncate(self._file, size)
        self._written = size
        os.fsync(self._file)

    def _start_block(self) -> None:
        """Have the block written that is filled, and return when there is another to fill."""
        self._writing.append(self._pool.submit(self._write, self._rooms[0][: self._filled].data, self._written))
        self._written, self._filled = self._written + self._filled, 0
        self._rooms.append(self._rooms.pop(0))
        if len(self._writing) > THREADS:
            self._writing.popleft().result()

    def _write(self, data: memoryview, at: int) -> None:
        total, may_change = len(data), True
        while data:
            try:
                count = os.pwrite(self._file, data, at)
            except OSError as error:
                if error.errno != errno.EINVAL or not may_change:
                    raise
                may_change = False  # the disk wants other blocks
                self._set_direct(False)
            else:
                data, at = data[count:], at + count
        if not self._direct and at % _FLUSHED_BYTES < total:  # else fsync would wait for all of them, and tell nothing
            os.fdatasync(self._file)
        self._on_disk(total)

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
        self._direct = on and _DIRECT != 0
