"""Reading a checkpoint: any box of any tensor, from whatever pieces it was stored in, each byte's checksum compared.

A reader opens what it needs, reads the chunks (4 MiB of a piece) that hold what is wanted, straight into place where a
chunk is wanted whole, and leaves the rest of the files alone. While it is open it holds a lock on the manifest, so that
no run deletes the folder under it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.checkpoint.files import Files
from parallel.checkpoint.manifest import (
    CHUNK_BYTES,
    CheckpointError,
    Manifest,
    StoredPiece,
    checksum,
    read_manifest,
    unread,
)
from parallel.checkpoint.place import locked
from parallel.sharding.boxes import Box, boxes_of_range, whole_box

_Bytes = NDArray[np.uint8]
T = TypeVar("T")


class Target(NamedTuple):
    """A box that is wanted, and where its elements go: a view of the box's shape, of any dtype, on any device."""

    box: Box
    values: Tensor


class Cost(NamedTuple):
    """Of reading something: bytes, and places in files that do not follow on one another."""

    bytes: int
    places: int


class Damaged(NamedTuple):
    """A part of a tensor that cannot be read: of its piece `box`, in `file`. why: for a message."""

    name: str
    file: str
    box: Box
    why: str


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

    @property
    def bytes(self) -> int:
        """Of it."""
        return min(CHUNK_BYTES, self.piece.box.numel * self.dtype.itemsize - self.first)


class Reader:
    """A checkpoint's folder, open for reading; a context manager.

    Args:
        folder: of one step. threads: that read at once. whole: files that are missing, or of another length, are
            refused at once; else only when something in them is wanted.

    Raises:
        CheckpointError: it is no complete checkpoint; and from every method, if what is read is damaged.
    """

    def __init__(self, folder: Path, threads: int = 2, *, whole: bool = True) -> None:
        self.folder, self.threads = folder, threads
        self._local = threading.local()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(folder))
            self.manifest: Manifest = read_manifest(folder)
            self.files = stack.enter_context(contextlib.closing(Files(folder, self.manifest.files)))
            for number in range(len(self.manifest.files) if whole else 0):
                self.files.check(number)
            self._open = stack.pop_all()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files."""
        self._open.close()

    # -- what is wanted ------------------------------------------------------------------------------------------------

    def read(self, wanted: Mapping[str, Sequence[Target]]) -> int:
        """Fill all targets, of tensors by name. Returns the bytes read.

        Raises:
            CheckpointError: damage is found, or the checkpoint has not all of it.
        """
        chunks = [chunk for name, targets in wanted.items() for chunk in self._chunks(name, targets)]
        return self._run(chunks)

    def cost(self, wanted: Mapping[str, Sequence[Box]]) -> Cost:
        """What reading these boxes would take."""
        chunks = [
            chunk
            for name, boxes in wanted.items()
            for chunk in self._chunks(name, [Target(box, torch.empty(box.shape, device="meta")) for box in boxes])
        ]
        spans = sorted((c.piece.file, start := c.piece.start + c.first, start + c.bytes) for c in chunks)
        breaks = sum(a[0] != b[0] or a[2] != b[1] for a, b in pairwise(spans))
        return Cost(sum(chunk.bytes for chunk in chunks), breaks + bool(spans))

    def whole(self, name: str) -> Tensor:
        """A logical tensor, put together."""
        if (stored := self.manifest.tensors.get(name)) is None:
            raise CheckpointError(f"{self.folder} has no {name}")
        values = torch.empty(stored.shape, dtype=stored.dtype)
        self.read({name: [Target(whole_box(stored.shape), values)]})
        return values

    def verify(self, files: Iterable[int] | None = None) -> int:
        """Compare every checksum (of the files of these numbers). Returns the bytes read."""
        chosen = set(range(len(self.manifest.files)) if files is None else files)
        for number in chosen:
            self.files.check_header(number)
        every = (chunk for name in self.manifest.tensors for chunk in self._all_chunks(name))
        return self._run([chunk for chunk in every if chunk.piece.file in chosen])

    def scan(self, name: str, see: Callable[[Tensor], T]) -> Iterator[T | Damaged]:
        """Read all of a tensor once, part by part, in no order that means anything.

        Args:
            see: is given the elements of a part: flat, at most `CHUNK_BYTES`, valid during the call; on any thread.

        Yields:
            For each part what `see` returns, or what is wrong with it.
        """

        def look(chunk: _Chunk) -> T | Damaged:
            data = self._scratch()[: chunk.bytes]
            try:
                self._fill(chunk, data.data)
                self._compare(chunk, data)
            except CheckpointError as error:
                return Damaged(name, self.manifest.files[chunk.piece.file].name, chunk.piece.box, str(error))
            return see(torch.from_numpy(data).view(chunk.dtype))

        with ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(look, self._all_chunks(name))

    def _all_chunks(self, name: str) -> Iterator[_Chunk]:
        tensor = self.manifest.tensors[name]
        for piece in tensor.pieces:
            for number in range(len(piece.checksums)):
                yield _Chunk(name, tensor.dtype, piece, number * CHUNK_BYTES, [])

    def _chunks(self, name: str, targets: Sequence[Target]) -> Iterator[_Chunk]:
        """What must be read of a tensor."""
        if (tensor := self.manifest.tensors.get(name)) is None:
            raise CheckpointError(f"{self.folder} has no {name}")
        if any(len(t.box.shape) != len(tensor.shape) for t in targets):
            raise CheckpointError(f"{self.folder} has {name} of the shape {list(tensor.shape)}, which is not wanted")
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
            for part in _parts(piece.box, first, min(first + length, piece.box.numel)):
                for target, _ in wanted:
                    if (common := part.common(target.box)) is not None:
                        puts.append((part, common, common.of(target.values, target.box.offset)))
            if puts:
                yield _Chunk(name, dtype, piece, first * dtype.itemsize, puts)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _run(self, chunks: Sequence[_Chunk]) -> int:
        if self.threads == 1 or len(chunks) < 2:
            return sum(map(self._read, chunks))
        inference = torch.is_inference_mode_enabled()  # of this thread, as tensors are that were made here

        def read(chunk: _Chunk) -> int:
            with torch.inference_mode(inference):
                return self._read(chunk)

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                return sum(pool.map(read, chunks))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @torch.no_grad()
    def _read(self, chunk: _Chunk) -> int:
        """Read a chunk, compare its checksum, put what is wanted of it in place. Returns its bytes."""
        count = chunk.bytes
        straight = _straight(chunk, count)
        data = self._scratch()[:count] if straight is None else straight
        self._fill(chunk, data.data)
        self._compare(chunk, data)
        if straight is None:
            self._put(chunk, torch.from_numpy(data))
        return count

    def _compare(self, chunk: _Chunk, data: _Bytes) -> None:
        if checksum(data) != chunk.piece.checksums[chunk.first // CHUNK_BYTES]:
            box = chunk.piece.box
            raise CheckpointError(
                f"{self._path(chunk)} is damaged: the checksum of {chunk.name} from {list(box.offset)} to "
                f"{list(box.end)} is wrong"
            )

    def _fill(self, chunk: _Chunk, data: memoryview) -> None:
        at = chunk.piece.start + chunk.first
        with self.files.opened(chunk.piece.file) as file:
            while data:
                try:
                    count = os.preadv(file, [data], at)
                except OSError as error:
                    raise unread(f"{self._path(chunk)} cannot be read", error) from error
                if not count:
                    raise CheckpointError(f"{self._path(chunk)} is shorter than when it was saved")
                data, at = data[count:], at + count

    def _put(self, chunk: _Chunk, data: Tensor) -> None:
        elements, start = data.view(chunk.dtype), 0
        parts: dict[Box, Tensor] = {}
        first, count = chunk.first // chunk.dtype.itemsize, elements.numel()
        for part in _parts(chunk.piece.box, first, first + count):
            parts[part] = elements[start : start + part.numel].view(part.shape)
            start += part.numel
        for part, common, values in chunk.puts:
            values.copy_(common.of(parts[part], part.offset))

    def _scratch(self) -> _Bytes:
        """Of this thread."""
        if not hasattr(self._local, "room"):
            self._local.room = np.empty(CHUNK_BYTES, np.uint8)
        room: _Bytes = self._local.room
        return room

    def _path(self, chunk: _Chunk) -> Path:
        return self.folder / self.manifest.files[chunk.piece.file].name


def _parts(box: Box, start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a flattened box of a tensor, as boxes of that tensor, in order."""
    for within in boxes_of_range(box.shape, start, stop):
        yield Box(tuple(a + b for a, b in zip(within.offset, box.offset, strict=True)), within.shape)


def _straight(chunk: _Chunk, count: int) -> _Bytes | None:
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
