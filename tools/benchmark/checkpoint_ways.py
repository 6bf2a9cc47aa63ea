"""Ways to write a rank's state and to read it again, for `tools.benchmark checkpoint`: each a whole folder on disk.

ours    engine.checkpoint: pieces in safetensors files, checksums, fsync, manifest, one rename
plain   as many bytes from memory by os.write in blocks of 8 MiB, fsync; read by os.preadv into memory
direct  the same past the page cache (O_DIRECT): what the disk can do
dcp     torch.distributed.checkpoint, plain tensors; on several ranks each rank's under names of its own, which
        spares it planning and resharding, and each in memory of its own, which spares it copies of views; no checksums
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch.distributed.checkpoint as dcp

from engine.assembly import Assembly
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver
from engine.checkpoint.states import held_pieces, restore
from parallel.checkpoint.read import Reader

_BLOCK = 8 << 20


class Way(ABC):
    """Collective over all ranks. A folder that `write` is given does not exist yet."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Return when all of this rank's state is on the disk."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Into memory that is there already."""


class Ours(Way):
    """What training does, when it waits for it."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly

    def write(self, folder: Path) -> None:
        """A save."""
        config = CheckpointConfig(keep=None)
        Saver(self.assembly, folder, config, {"config": {}, "about": {}}).save(1, {}, {})

    def read(self, folder: Path) -> None:
        """Every checksum is compared."""
        with Reader(folder / "step-00000001") as reader:
            restore(self.assembly, reader)


class Plain(Way):
    """Bytes of no meaning."""

    def __init__(self, rank: int, size: int, *, direct: bool = False) -> None:
        self._name, self._flags = f"{rank}", os.O_DIRECT if direct else 0
        self._room = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)  # pages, as O_DIRECT wants
        np.frombuffer(self._room, np.uint32)[:] = np.random.default_rng(rank).integers(1 << 32)

    def write(self, folder: Path) -> None:
        """Block by block."""
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / self._name, os.O_WRONLY | os.O_CREAT | self._flags)
        for block in self._blocks():
            assert os.write(file, block) == len(block)
        os.fsync(file)
        os.close(file)

    def read(self, folder: Path) -> None:
        """Block by block."""
        file = os.open(folder / self._name, os.O_RDONLY | self._flags)
        for block in self._blocks():
            assert os.readv(file, [block]) == len(block)
        os.close(file)

    def _blocks(self) -> Sequence[memoryview]:
        data = memoryview(self._room)
        return [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]


class Dcp(Way):
    """torch.distributed.checkpoint of what this rank accounts for.

    Args:
        threads: that write; its default is one.
    """

    def __init__(self, assembly: Assembly, threads: int = 1) -> None:
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one rank needs none
        self._alone, self._threads = assembly.grid.world.size == 1, threads
        prefix = "" if self._alone else f"{assembly.grid.world.index}."
        pieces = (piece for piece in held_pieces(assembly) if piece.values[piece.own].numel())
        self._state = {f"{prefix}{piece.name}": piece.values[piece.own].clone() for piece in pieces}

    @property
    def nbytes(self) -> int:
        """Of this rank."""
        return sum(values.nbytes for values in self._state.values())

    def with_threads(self, threads: int) -> Dcp:
        """The same state."""
        other = copy(self)
        other._threads = threads
        return other

    def write(self, folder: Path) -> None:
        """With fsync, as is its default."""
        writer = dcp.FileSystemWriter(folder, thread_count=self._threads)
        dcp.save(dict(self._state), storage_writer=writer, no_dist=self._alone)

    def read(self, folder: Path) -> None:
        """In place."""
        dcp.load(dict(self._state), storage_reader=dcp.FileSystemReader(folder), no_dist=self._alone)


def all_ways(assembly: Assembly) -> dict[str, Way]:
    """By name, as measured."""
    rank, theirs = assembly.grid.world.index, Dcp(assembly)
    plain = {name: Plain(rank, theirs.nbytes, direct=direct) for name, direct in (("plain", False), ("direct", True))}
    return {**plain, "ours": Ours(assembly), "dcp": theirs, "dcp, 2 threads": theirs.with_threads(2)}


DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def forget_pages(folder: Path) -> None:
    """Have the next reading of all files come from the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("1")  # if we may
