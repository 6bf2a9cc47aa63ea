"""Reading a checkpoint: any box of any tensor, from whatever pieces it was stored in, each byte's checksum compared.

A reader opens what it needs, reads the chunks (4 MiB of a piece) that hold what is wanted, straight into place where a
chunk is wanted whole, and leaves the rest of the files alone. While it is open it holds a lock on the manifest, so that
no run deletes the folder under it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.manifest import (
    CHUNK_BYTES,
    FILE,
    CheckpointError,
    Manifest,
    StoredPiece,
    checksum,
    read_manifest,
)
from parallel.sharding.boxes import Box, boxes_of_range, whole_box


class Target(NamedTuple):
    """A box that is wanted, and where its elements go: a view of the box's shape, of any dtype, on any device."""

    box: Box
    values: Tensor


class _Chunk(NamedTuple):
    """Bytes of a file that are read at once.

    Attributes:
        first: number of its first byte in the piece. puts: (what of it is wanted, view to be filled) of each box.
    """

    name: str
    dtype: torch.dtype
    piece: StoredPiece
    first: int
    puts: list[tuple[Box, Box, Tensor]]


class Reader:
    """A checkpoint's folder, open for reading; a context manager.

    Args:
        folder: of one step. threads: that read at once.

    Raises:
        CheckpointError: it is no complete checkpoint; and from every method, if what is read is damaged.
    """

    def __init__(self, folder: Path, threads: int = 2) -> None:
        self.folder, self.threads = folder, threads
        self._files: dict[int, int] = {}
        self._local = threading.local()
        self._guard = threading.Lock()
        self._lock: int | None = None
        try:
            self._take_lock()
            self.manifest: Manifest = read_manifest(folder)
            self._check_sizes()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files."""
        for file in (*self._files.values(), *(() if self._lock is None else (self._lock,))):
            os.close(file)
        self._files, self._lock = {}, None

    def _take_lock(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._lock = os.open(self.folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"{self.folder} is being deleted") from error
            except OSError:
                pass  # not every file system has locks

    def _check_sizes(self) -> None:
        for file in self.manifest.files:
            path = self.folder / file.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path} is missing ({error.strerror})") from error
            if size != file.bytes:
                raise CheckpointError(f"{path} has {size} bytes where it had {file.bytes} when it was saved")

    # -- what is wanted ------------------------------------------------------------------------------------------------

    def read(self, wanted: Mapping[str, Sequence[Target]]) -> int:
        """Fill all targets, of tensors by name. Returns the bytes read.

        Raises:
            CheckpointError: damage is found, or the checkpoint has not all of it.
        """
        chunks = [chunk for name, targets in wanted.items() for chunk in self._chunks(name, targets)]
        return self._run(chunks)

    def whole(self, name: str) -> Tensor:
        """A logical tensor, put together."""
        stored = self.manifest.tensors[name]
        values = torch.empty(stored.shape, dtype=stored.dtype)
        self.read({name: [Target(whole_box(stored.shape), values)]})
        return values

    def verify(self, files: Iterable[int] | None = None) -> int:
        """Compare every checksum (of the files of these numbers). Returns the bytes read."""
        chosen = set(range(len(self.manifest.files)) if files is None else files)
        for number in chosen:
            self._check_header(number)
        chunks = [
            _Chunk(name, tensor.dtype, piece, first * CHUNK_BYTES, [])
            for name, tensor in self.manifest.tensors.items()
            for piece in tensor.pieces
            if piece.file in chosen
            for first in range(len(piece.checksums))
        ]
        return self._run(chunks)

    def _check_header(self, number: int) -> None:
        stored, file = self.manifest.files[number], self._open(number)
        length = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
        if length > stored.bytes or checksum(os.pread(file, length, 0)) != stored.header:
            raise CheckpointError(f"{self.folder / stored.name} is damaged: the checksum of its header is wrong")

    def _chunks(self, name: str, targets: Sequence[Target]) -> Iterator[_Chunk]:
        """What must be read of a tensor."""
        tensor = self.manifest.tensors[name]
        found = 0
        for piece in tensor.pieces:
            wanted = [(t, common) for t in targets if (common := piece.box.common(t.box)) is not None]
            found += sum(common.numel for _, common in wanted)
            if wanted:
                yield from self._chunks_of_piece(name, tensor.dtype, piece, wanted)
        if found != sum(t.box.numel for t in targets):
            raise CheckpointError(f"{self.folder}: some of {name} is in none of its files")

    def _chunks_of_piece(
        self, name: str, dtype: torch.dtype, piece: StoredPiece, wanted: Sequence[tuple[Target, Box]]
    ) -> Iterator[_Chunk]:
        length = CHUNK_BYTES // dtype.itemsize
        for first in range(0, piece.box.numel, length):
            puts = []
            for within in boxes_of_range(piece.box.shape, first, min(first + length, piece.box.numel)):
                offset = tuple(a + b for a, b in zip(within.offset, piece.box.offset, strict=True))
                part = Box(offset, within.shape)
                for target, _ in wanted:
                    if (common := part.common(target.box)) is not None:
                        puts.append((part, common, common.of(target.values, target.box.offset)))
            if puts:
                yield _Chunk(name, dtype, piece, first * dtype.itemsize, puts)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _run(self, chunks: Sequence[_Chunk]) -> int:
        for number in {chunk.piece.file for chunk in chunks}:
            self._open(number)
        if self.threads == 1 or len(chunks) < 2:
            return sum(map(self._read, chunks))
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                return sum(pool.map(self._read, chunks))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _open(self, number: int) -> int:
        with self._guard:
            if number not in self._files:
                path = self.folder / self.manifest.files[number].name
                try:
                    self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
            return self._files[number]

    @torch.no_grad()
    def _read(self, chunk: _Chunk) -> int:
        """Read a chunk, compare its checksum, put what is wanted of it in place. Returns its bytes."""
        count = min(CHUNK_BYTES, chunk.piece.box.numel * chunk.dtype.itemsize - chunk.first)
        straight = _straight(chunk, count)
        data = self._scratch()[:count] if straight is None else straight
        self._fill(chunk, data.data)
        if checksum(data) != chunk.piece.checksums[chunk.first // CHUNK_BYTES]:
            box = chunk.piece.box
            raise CheckpointError(
                f"{self._path(chunk)} is damaged: the checksum of {chunk.name} from {list(box.offset)} to "
                f"{list(box.end)} is wrong"
            )
        if straight is None:
            self._put(chunk, torch.from_numpy(data))
        return count

    def _fill(self, chunk: _Chunk, data: memoryview) -> None:
        file, at = self._files[chunk.piece.file], chunk.piece.start + chunk.first
        while data:
            try:
                count = os.preadv(file, [data], at)
            except OSError as error:
                raise CheckpointError(f"{self._path(chunk)} cannot be read ({error.strerror})") from error
            if not count:
                raise CheckpointError(f"{self._path(chunk)} is shorter than when it was saved")
            data, at = data[count:], at + count

    def _put(self, chunk: _Chunk, data: Tensor) -> None:
        elements, start = data.view(chunk.dtype), 0
        parts: dict[Box, Tensor] = {}
        first, count = chunk.first // chunk.dtype.itemsize, elements.numel()
        for within in boxes_of_range(chunk.piece.box.shape, first, first + count):
            offset = tuple(a + b for a, b in zip(within.offset, chunk.piece.box.offset, strict=True))
            parts[Box(offset, within.shape)] = elements[start : start + within.numel].view(within.shape)
            start += within.numel
        for part, common, values in chunk.puts:
            values.copy_(common.of(parts[part], part.offset))

    def _scratch(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Of this thread."""
        if not hasattr(self._local, "room"):
            self._local.room = np.empty(CHUNK_BYTES, np.uint8)
        room: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = self._local.room
        return room

    def _path(self, chunk: _Chunk) -> Path:
        return self.folder / self.manifest.files[chunk.piece.file].name


def _straight(chunk: _Chunk, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None:
    """The memory that a chunk can be read into, if all of it is wanted, and in one place."""
    at = first = chunk.puts[0][2].data_ptr() if chunk.puts else 0
    for part, common, values in chunk.puts:
        plain = values.dtype == chunk.dtype and values.device.type == "cpu" and values.is_contiguous()
        if part != common or not plain or values.data_ptr() != at:
            return None
        at += values.nbytes
    if at - first != count or not count:
        return None
    values = chunk.puts[0][2]
    flat = values.as_strided((count // values.itemsize,), (1,), values.storage_offset())
    return flat.view(torch.uint8).numpy()
