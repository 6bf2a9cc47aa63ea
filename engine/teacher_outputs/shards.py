"""Files of a teacher's outputs: .npy arrays of rows, each complete or not there, mapped into memory to be read.

`training-000000008192-000000016384-0123456789abcdef.npy` has rows 8192 to 16383, and a checksum of the file's bytes,
which is compared once a process, when it first reads there.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError, OutputError
from engine.teacher_outputs.meta import FILE, PARTS, Meta, Part, read_meta
from parallel.checkpoint.manifest import checksum
from parallel.checkpoint.place import sync

_NAME = re.compile(r"(training|held_out)-(\d{12})-(\d{12})-([0-9a-f]{16})\.npy", re.ASCII)
_WRITING = ".writing"
Rows = NDArray[np.void]


def ranges(meta: Meta, part: Part) -> Iterator[range]:
    """The rows of each file that there is to be."""
    total = meta.rows_of(part)
    yield from (range(at, min(at + meta.rows_per_file, total)) for at in range(0, total, meta.rows_per_file))


def has_rows(folder: Path) -> bool:
    """Whether there are files of rows, of whatever."""
    return any(_files(folder, part) for part in PARTS)


def missing(folder: Path, meta: Meta, part: Part) -> list[range]:
    """Of `ranges`, those that no file has all of."""
    there = _files(folder, part)
    return [rows for rows in ranges(meta, part) if rows.start not in there or there[rows.start][0] < rows.stop]


def _files(folder: Path, part: Part) -> dict[int, tuple[int, Path]]:
    """(row after its last, path) of each file, by its first row; of several the longest."""
    found = dict[int, tuple[int, Path]]()
    for path in folder.iterdir():
        if (match := _NAME.fullmatch(path.name)) and match[1] == part:
            first, stop = int(match[2]), int(match[3])
            found[first] = max(found.get(first, (0, path)), (stop, path))
    return found


def begin(folder: Path, meta: Meta) -> None:
    """Say what the folder is of, and remove what writers that were cut off have left. Raises OutputError."""
    try:
        for path in folder.glob(f"*{_WRITING}"):
            path.unlink(missing_ok=True)
        _write(folder / FILE, meta.to_json().encode())
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror}") from error


def write_rows(folder: Path, part: Part, first: int, rows: Rows) -> Path:
    """A file of rows from the `first` on, which takes the place of a shorter one. Raises OutputError."""
    file = io.BytesIO()
    np.save(file, rows)
    data = file.getvalue()
    path = folder / f"{part}-{first:012d}-{first + len(rows):012d}-{checksum(data)}.npy"
    try:
        older = _files(folder, part).get(first)
        _write(path, data)
        if older is not None and older[1] != path:
            older[1].unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}: make room, and start again") from error
    return path


def _write(path: Path, data: bytes) -> None:
    """All of it, or nothing."""
    temporary = path.with_name(path.name + _WRITING)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


class StoredOutputs:
    """A folder of a teacher's outputs, of which the rows are read that are asked for.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        self._files: dict[Part, dict[int, tuple[int, Path]]] = {}
        self._mapped: dict[Path, Rows] = {}

    def check(self, rows: int) -> None:
        """Raise ConfigError if not all of the first so many rows of the training part, and of the other, are there."""
        training, held_out = (missing(self.folder, self.meta, part) for part in PARTS)
        there = _files(self.folder, "training")
        # of a file that a longer one is to take the place of, there are the first rows
        known = min([self.meta.rows, *(there.get(gap.start, (gap.start,))[0] for gap in training)])
        if rows <= known and not held_out:
            return
        what = f"outputs of {known} {self.meta.key}s, and the run needs {rows}"
        if rows <= known:
            what = "not the outputs of all held-out images"
        raise ConfigError(
            f"{self.folder} has {what}: python -m tools.teacher_outputs with the configuration of this run and its "
            f"checkpoint of the teacher, and --out {self.folder}, writes what is missing"
        )

    def read(self, part: Part, numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows by their numbers, each array of them with the numbers in front; of numbers below 0 the first row.

        Raises:
            ConfigError: there is no such row, or its file is damaged.
        """
        numbers = np.maximum(numbers, 0)
        out = np.empty(len(numbers), self.meta.row)
        files = numbers // self.meta.rows_per_file
        for file in np.unique(files):
            first = int(file) * self.meta.rows_per_file
            rows, own = self._rows(part, first), files == file
            if (last := int(numbers[own].max())) >= first + len(rows):
                raise ConfigError(f"{self.folder} has no {part} row {last}: see tools.teacher_outputs")
            out[own] = rows[numbers[own] - first]
        return _named(out)

    def blank(self, like: Tensor) -> dict[str, Tensor]:
        """Rows of nothing, for those who plan: [B] -> as `read` gives them, on that device."""
        rows = _named(np.zeros(1, self.meta.row))
        return {name: values.to(like.device).expand(len(like), *values.shape[1:]) for name, values in rows.items()}

    def _rows(self, part: Part, first: int) -> Rows:
        known = self._files.get(part, {}).get(first)
        if known is None or not (known[1] in self._mapped or known[1].exists()):
            self._files[part] = _files(self.folder, part)  # a longer file may have taken its place
        if first not in self._files[part]:
            raise ConfigError(f"{self.folder} has no {part} rows from {first} on: see tools.teacher_outputs")
        stop, path = self._files[part][first]
        if path not in self._mapped:
            self._mapped[path] = self._map(path, stop - first)
        return self._mapped[path]

    def _map(self, path: Path, count: int) -> Rows:
        """Compare the checksum, and map what is there."""
        try:
            said = _NAME.fullmatch(path.name)
            whole = said is not None and checksum(path.read_bytes()) == said[4]
            rows: Rows = np.load(path, mmap_mode="r") if whole else np.empty(0, self.meta.row)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not whole or rows.dtype != self.meta.row or rows.shape != (count,):
            raise ConfigError(
                f"{path} is damaged: delete it, and python -m tools.teacher_outputs with --out {self.folder} writes it "
                "again"
            )
        return rows


def _named(rows: Rows) -> dict[str, Tensor]:
    """The arrays of rows, in the formats that torch computes in."""
    return {
        name: torch.from_numpy(np.array(rows[name], np.int64 if name == "ids" else np.float32, order="C"))
        for name in rows.dtype.names or ()
    }


@cache
def stored_at(path: str) -> StoredOutputs:
    """A folder, opened once in a process. Raises ConfigError."""
    return StoredOutputs(Path(path))
