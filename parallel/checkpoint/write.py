"""Writing one rank's file of a checkpoint: safetensors, checksummed while it is written.

The header is that of the safetensors format: eight bytes of its length, JSON with dtype, shape and place of each
tensor, then their bytes. Tensors of a file are boxes of logical tensors, and are called by name and box:
`weights/blocks.0.in_proj.weight[0:96, 0:64]`.
"""

from __future__ import annotations

import json
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
    """Write a new file and see it on the disk.

    Args:
        items: `in_order`. metadata: for the header. on_disk: see BlockFile.

    Raises:
        OSError: as of a full disk.
    """
    header = _header(items, metadata)
    entries = []
    size = len(header) + sum(item.box.numel * item.values.itemsize for item in items)
    with BlockFile(path, size, on_disk) as file:
        file.write(np.frombuffer(header, np.uint8))
        for item in items:
            start, data = file.size, as_bytes(item.values.cpu())
            chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
            sums = []
            for chunk in chunks:
                sums.append(checksum(chunk))
                file.write(chunk)
            entries.append((item.name, item.values.dtype, item.shape, item.box, start, tuple(sums)))
        file.sync()
    return Written(StoredFile(path.name, file.size, checksum(header)), entries)


def _header(items: Sequence[Item], metadata: dict[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for item in items:
        start, end = end, end + item.box.numel * item.values.itemsize
        table[item.key] = {"dtype": DTYPES[item.values.dtype], "shape": item.box.shape, "data_offsets": (start, end)}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
