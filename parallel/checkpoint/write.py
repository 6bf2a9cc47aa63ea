"""Writing one rank's file of a checkpoint: safetensors, checksummed while it is written.

The header is that of the safetensors format: eight bytes of its length, JSON with dtype, shape and place of each
tensor, then their bytes. Tensors of a file are boxes of logical tensors, and are called by name and box:
`weights/blocks.0.in_proj.weight[0:96, 0:64]`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.checkpoint.blocks import BlockFile
from parallel.checkpoint.manifest import CHUNK_BYTES, DTYPES, StoredFile, checksum
from parallel.sharding.boxes import Box
from parallel.sharding.pieces import StatePiece


class Item(NamedTuple):
    """What a rank is to write: a box of a logical tensor, and its elements, a view of the box's shape."""

    name: str
    shape: tuple[int, ...]
    box: Box
    values: Tensor

    @property
    def key(self) -> str:
        """Its name in the file."""
        if not self.shape:
            return self.name
        spans = (f"{start}:{end}" for start, end in zip(self.box.offset, self.box.end, strict=True))
        return f"{self.name}[{', '.join(spans)}]"


@dataclass(frozen=True)
class Written:
    """What a rank has written.

    Attributes:
        file: of it. entries: (name, dtype, logical shape, box, start in the file, checksums) of each item.
    """

    file: StoredFile
    entries: list[tuple[str, torch.dtype, tuple[int, ...], Box, int, tuple[str, ...]]]


def items_of(pieces: Iterable[StatePiece]) -> Iterator[Item]:
    """What of this rank's pieces it alone is to write: what it accounts for, as boxes."""
    for piece in pieces:
        for box, values in piece.boxes(own=True):
            yield Item(piece.name, piece.layout.shape, box, values)


def in_order(items: Iterable[Item]) -> list[Item]:
    """As they stand in a file: wide numbers first, so that all are aligned."""
    return sorted(items, key=lambda item: -item.values.itemsize)


def as_bytes(values: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor on the host, row by row: its memory, or a copy of what lies otherwise."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy()


def write_file(
    path: Path, items: Sequence[Item], metadata: dict[str, str], on_disk: Callable[[int], None] = lambda count: None
) -> Written:
    """Write a rank's file and see it on the disk.

    Args:
        items: `in_order`. metadata: for the header. on_disk: see BlockFile.

    Raises:
        OSError: as of a full disk.
    """
    entries = [FileEntry(item.key, item.box.shape, item.values.dtype) for item in items]
    places = write_tensors(path, entries, (item.values for item in items), metadata, on_disk)
    written = [
        (item.name, item.values.dtype, item.shape, item.box, place.start, place.checksums)
        for item, place in zip(items, places.tensors, strict=True)
    ]
    return Written(places.file, written)


class FileEntry(NamedTuple):
    """A tensor of a file: its name there, its shape and type."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """Where a tensor starts in its file, and the checksums of each `CHUNK_BYTES` of it."""

    start: int
    checksums: tuple[str, ...]


class WrittenFile(NamedTuple):
    """A file that was written, and where its tensors are, in their order."""

    file: StoredFile
    tensors: list[Place]


def write_tensors(
    path: Path,
    entries: Sequence[FileEntry],
    tensors: Iterable[Tensor],
    metadata: dict[str, str],
    on_disk: Callable[[int], None] = lambda count: None,
) -> WrittenFile:
    """Write a new safetensors file and see it on the disk.

    Args:
        entries: wide numbers first, so that all are aligned. tensors: of the entries, each asked for when the one
            before is written. metadata: for the header. on_disk: see BlockFile.

    Raises:
        OSError: as of a full disk.
    """
    header = _header(entries, metadata)
    places = []
    with BlockFile(path, len(header) + sum(entry.bytes for entry in entries), on_disk) as file:
        file.write(np.frombuffer(header, np.uint8))
        for entry, values in zip(entries, tensors, strict=True):
            assert (tuple(values.shape), values.dtype) == entry[1:], entry
            start, data = file.size, as_bytes(values.cpu())
            sums = []
            for i in range(0, len(data), CHUNK_BYTES):
                sums.append(checksum(data[i : i + CHUNK_BYTES]))
                file.write(data[i : i + CHUNK_BYTES])
            places.append(Place(start, tuple(sums)))
        file.sync()
    return WrittenFile(StoredFile(path.name, file.size, checksum(header)), places)


def _header(entries: Sequence[FileEntry], metadata: dict[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        table[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
