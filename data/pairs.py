"""Tables of images and captions, CSV or TSV, as compact arrays: millions of rows in some 150 bytes each.

The first row names the columns. Rows with the same image are captions of it. Images are found relative to the table.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

_DIGEST = 16  # bytes of a hash, by which images are known to be the same
_DELIMITERS = {".tsv": "\t,;", ".tab": "\t,;"}  # tried in this order; by the columns that they give


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The N images of a table and what is said of them, in the order in which it first names them.

    Attributes:
        root: the table's folder. classes: in the order of their labels; none without a column of labels.
        names: uint8, all paths, as the table has them, one after the other. ends: [N] where each ends. labels: [N];
            without classes the images' own numbers.
        said: uint8, all captions, image by image. said_ends: where each ends. captions: [N] how many there are up to
            and with each image.
        left_out: how many rows were not taken, by reason. first: of each reason, the first such row.
    """

    root: str
    classes: tuple[str, ...]
    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64]
    said: NDArray[np.uint8]
    said_ends: NDArray[np.int64]
    captions: NDArray[np.int64]
    left_out: dict[str, int]
    first: dict[str, str]

    def __len__(self) -> int:
        return len(self.ends)

    def file(self, index: int) -> str:
        """Path of an image."""
        return str(Path(self.root) / os.fsdecode(_piece(self.names, self.ends, index)))

    def captions_of(self, index: int) -> range:
        """The numbers of an image's captions."""
        return range(int(self.captions[index - 1]) if index else 0, int(self.captions[index]))

    def caption(self, number: int) -> str:
        """A caption by its number."""
        return _piece(self.said, self.said_ends, number).decode()

    @property
    def fingerprint(self) -> str:
        """A hash of the images' names, classes, labels and order: equal on two ranks if they read the same."""
        return _digest(json.dumps(self.classes).encode(), self.names, self.ends, self.labels)

    @property
    def captions_fingerprint(self) -> str:
        """The same of the captions."""
        return _digest(b"", self.said, self.said_ends, self.captions)

    def describe(self) -> str:
        """E.g. `150 images and 750 captions in photos; left out: 2 rows without a caption (the first in line 7)`."""
        classes = f" of {len(self.classes)} classes" if self.classes else ""
        reasons = [f"{count} {reason} (the first: {self.first[reason]})" for reason, count in self.left_out.items()]
        taken = f"{len(self)} images{classes} with {len(self.said_ends)} captions in {self.root}"
        return f"{taken}; left out: {', '.join(reasons) or 'nothing'}"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that are read; label: None, if there are no classes."""

    image: str
    caption: str
    label: str | None

    @property
    def wanted(self) -> tuple[str, ...]:
        return (self.image, self.caption, *(() if self.label is None else (self.label,)))


def read_pairs(path: str, key: str, columns: Columns, classes: Sequence[str] | None = None) -> Pairs:
    """Read a table. `key` is the name of the option that gave it; `classes` are given where another table has them.

    Raises:
        ValueError: for a table that is missing, cannot be read, lacks a column, or has no usable row.
    """
    given = f"{key}={path}"
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            raise ValueError(f"{given} is a folder: give the table itself, a CSV or TSV file")
        return _read(file, given, columns, classes)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{given} cannot be read ({error}): give a CSV or TSV file of images and captions") from error


@dataclass
class _LeftOut:
    """Rows that are not taken: how many for each reason, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, line: int, what: str = "", count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, f"line {line}" + (f", {what}" if what else ""))


def _read(file: Path, given: str, columns: Columns, classes: Sequence[str] | None) -> Pairs:
    left_out, table = _LeftOut(), _Table(file, given, columns)
    digests, names, said, labels, lines = bytearray(), _Strings(), _Strings(), _Strings(), array("q")
    for line, (name, caption, *label) in table.rows(left_out):
        encoded = os.fsencode(name)
        digests += hashlib.blake2b(encoded, digest_size=_DIGEST).digest()
        names.add(encoded)
        said.add(caption.encode())
        labels.add(label[0].encode() if label else b"")
        lines.append(line)
    order, counts = _group(np.frombuffer(bytes(digests), dtype=f"V{_DIGEST}"))
    first = order[np.cumsum(counts) - counts]
    is_there = np.ones(len(first), dtype=bool)
    for image, row in enumerate(first.tolist()):
        path = os.fsdecode(names[row])
        if not _is_file(file.parent, path):
            is_there[image] = False
            left_out.add("rows of images that are missing", lines[row], path[:200], count=int(counts[image]))
    if not is_there.any():
        wrong = ", ".join(f"{n} {why} (the first: {left_out.first[why]})" for why, n in left_out.counts.items())
        raise ValueError(
            f"{given} has no row with a caption and an image that is there: left out were {wrong or 'no rows'}; paths "
            f"of images are looked for in {file.parent}"
        )
    first = first[is_there]
    found, numbers = _labels([labels[row].decode() for row in first.tolist()], given, columns, classes)
    paths, ends = names.joined(first)
    captions, caption_ends = said.joined(order[np.repeat(is_there, counts)])
    return Pairs(
        root=str(file.parent),
        classes=found,
        labels=numbers,
        names=paths,
        ends=ends,
        said=captions,
        said_ends=caption_ends,
        captions=np.cumsum(counts[is_there], dtype=np.int64),
        left_out=left_out.counts,
        first=left_out.first,
    )


class _Strings:
    """Many strings, one after the other."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def add(self, text: bytes) -> None:
        self._bytes += text
        self._ends.append(len(self._bytes))

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._bytes[self._ends[index] : self._ends[index + 1]])

    def joined(self, order: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Those at `order`, and where each ends."""
        joined, ends = bytearray(), np.empty(len(order), dtype=np.int64)
        for place, index in enumerate(order.tolist()):
            joined += self[index]
            ends[place] = len(joined)
        return np.frombuffer(bytes(joined), dtype=np.uint8), ends


def _group(digests: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(all rows, image by image, both in the order of the table; how many each image has)."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    images = place[inverse]
    return np.argsort(images, kind="stable"), np.bincount(images, minlength=len(first))


def _is_file(root: Path, name: str) -> bool:
    try:
        return (root / name).is_file()
    except (OSError, ValueError):  # too long; a zero within
        return False


def _labels(
    names: list[str], given: str, columns: Columns, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """(classes, label of each image)."""
    if columns.label is None:
        return (), np.arange(len(names))
    known = sorted(set(names)) if classes is None else list(classes)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"{given} has {columns.label} {unknown[:5]}, which data.path does not have: held-out images must be of the "
            "classes that are trained on"
        )
    numbers = {name: number for number, name in enumerate(known)}
    return tuple(known), np.array([numbers[name] for name in names], dtype=np.int64)


class _Table:
    """Rows of a file, the wanted columns of each."""

    def __init__(self, file: Path, given: str, columns: Columns) -> None:
        self._file, self._columns = file, columns
        with file.open("rb") as opened:
            begin = opened.read(4)
        utf_16 = begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        self._encoding = "utf-16" if utf_16 else "utf-8-sig"
        with self._open() as lines:
            head = next(iter(lines), "")
        for delimiter in _DELIMITERS.get(file.suffix.lower(), ",\t;"):
            header = next(csv.reader([head], delimiter=delimiter), [])
            names = [name.strip() for name in header]
            if set(columns.wanted) <= set(names):
                break
        else:
            missing = [name for name in columns.wanted if name not in head] or list(columns.wanted)
            raise ValueError(
                f"{given} has no column {missing[0]!r} in its first row {head.strip()[:200]!r}: name columns there, "
                "and say in data.image_column, data.caption_column and data.label_column which to read"
            )
        self._delimiter, self._width = delimiter, len(names)
        self._places = [names.index(name) for name in columns.wanted]

    def rows(self, left_out: _LeftOut) -> Iterator[tuple[int, list[str]]]:
        """(line in the file, image, caption and label if wanted); what is no such row is counted."""
        with self._open() as lines:
            next(lines)
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:  # also of a quotation mark that is not closed, after 2^17 characters
                    left_out.add("rows that are no CSV", reader.line_num + 1, str(error))
                    continue
                line = reader.line_num + 1
                if (found := self._wanted(row, line, left_out)) is not None:
                    yield line, found

    def _wanted(self, row: list[str], line: int, left_out: _LeftOut) -> list[str] | None:
        if not row:  # an empty line
            return None
        if len(row) != self._width:
            left_out.add("rows of another length than the first", line, f"{len(row)} columns, not {self._width}")
            return None
        found = [row[place].strip() for place in self._places]
        for name, value in zip(self._columns.wanted, found, strict=True):
            if not value:
                left_out.add(f"rows without {name}", line)
                return None
        try:
            "".join(found).encode()
        except UnicodeEncodeError:
            left_out.add("rows that are not UTF-8", line)
            return None
        return found

    def _open(self) -> TextIO:
        return self._file.open(encoding=self._encoding, errors="surrogateescape", newline="")


def _piece(joined: NDArray[np.uint8], ends: NDArray[np.int64], index: int) -> bytes:
    first = int(ends[index - 1]) if index else 0
    return joined[first : int(ends[index])].tobytes()


def _digest(begin: bytes, *arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256(begin)
    for part in arrays:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
