"""The index of a tar file: where each sample's parts lie, and a checksum of all its bytes.

A file beside the tar file, little-endian: HEADER; a JSON text (the words that labels are, what was left out); zeros up
to a multiple of 8; one RECORD for each sample, mapped into memory when it is needed; the keys, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.listing import SUFFIXES
from data.shards.members import Sample, ShardError, samples

_VERSION = 1
_MAGIC = b"VITSHARD"
_CHUNK = 4 * 2**20
_LARGEST = 2**32  # bytes of one part
_COPIES, _MOST_COPIES = ".copies", 1024  # a file beside an index; lines of it

HEADER = np.dtype(
    [
        ("magic", "S8"), ("version", "<u8"), ("count", "<u8"), ("keys", "<u8"), ("words", "<u8"),
        ("tar_size", "<u8"), ("tar_mtime", "<i8"), ("tar_hash", "<u8"), ("body_hash", "<u8"),
    ]
)  # fmt: skip
"""Of the tar file: bytes, nanoseconds, XXH3 of all of it. keys, words: bytes. body_hash: XXH3 of all that follows."""

RECORD = np.dtype(
    [
        ("image", "<u8"), ("text", "<u8"), ("json", "<u8"),
        ("image_size", "<u4"), ("text_size", "<u4"), ("json_size", "<u4"), ("label", "<i4"), ("key_end", "<u8"),
    ]
)  # fmt: skip
"""Offsets of a sample's parts in the tar file, 0: none; their sizes; its label, -1: none. That is the number which is
written there, or, unless all of the tar file are numbers, the place among the words, which are sorted."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What opening a set needs of an index.

    Attributes:
        largest: label, where they are numbers. unlabelled: samples without one. left_out: how much, by reason.
    """

    count: int
    tar_size: int
    tar_mtime: int
    tar_hash: int
    words: tuple[str, ...]
    largest: int
    unlabelled: int
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Index:
    """All of an index."""

    records: NDArray[np.void]
    keys: NDArray[np.uint8]
    tar_hash: int
    body_hash: int

    def key(self, row: int) -> str:
        """A sample's name within its tar file."""
        first = int(self.records["key_end"][row - 1]) if row else 0
        return self.keys[first : int(self.records["key_end"][row])].tobytes().decode(errors="surrogateescape")


def place(tar: str, folder: str | None, label: str | None) -> str:
    """Where the index of a tar file is: beside it, or in `folder`. That by a JSON's field `label` is another one."""
    ending = ".index" if label is None else f".{label}.index"
    if folder is None:
        return tar + ending
    digest = hashlib.sha256(os.fsencode(Path(tar).absolute())).hexdigest()[:16]
    return os.path.expanduser(f"{folder}/{Path(tar).name}.{digest}{ending}")  # noqa: PTH111


def make_index(tar: str, where: str, label: str | None) -> None:
    """Read a tar file whole, once, and write its index, or nothing.

    Args:
        label: the field of each sample's `.json` that has its class; None: its `.cls`.

    Raises:
        ShardError: the tar file is no good, or the index cannot be written.
    """
    folder = Path(where).parent
    with _writing(where):  # if it cannot be, that is found out before much is read
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    with _reading(tar), open(tar, "rb") as opened:  # noqa: PTH123
        status = os.fstat(opened.fileno())
        content = _content(Path(tar), opened, label)
        tar_hash, after = _hash(opened), os.fstat(opened.fileno())
    if (status.st_size, status.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ShardError(f"{tar} has changed while it was indexed: start again once nobody writes to it")
    header = np.zeros(1, dtype=HEADER)
    header["magic"], header["version"] = _MAGIC, _VERSION
    header["tar_size"], header["tar_mtime"], header["tar_hash"] = status.st_size, status.st_mtime_ns, tar_hash
    _write(where, header, *content)


def note_copy(where: str, tar_mtime: int, tar_hash: int) -> None:
    """A tar file of another time than when it was indexed has the same bytes: note that, where it can be, beside the
    index, which hosts may share that have copies of their own."""
    with suppress(OSError):
        noted = [(tar_mtime, tar_hash), *copies(where)][:_MOST_COPIES]
        write_whole(Path(where + _COPIES), "".join(f"{time} {known}\n" for time, known in noted).encode())


def copies(where: str) -> set[tuple[int, int]]:
    """(time, hash) of copies that are known to have the bytes of then."""
    try:
        lines = Path(where + _COPIES).read_text().splitlines()
        return {(int(time), int(known)) for time, known in map(str.split, lines)}
    except (OSError, ValueError):
        return set()


def read_head(where: str) -> Head | None:
    """None: there is no index there, or none of this version, or only a part of one."""
    try:
        with open(where, "rb", buffering=0) as opened:  # noqa: PTH123
            begin = opened.read(4096)
            header = _fields(begin)
            if header["magic"] != _MAGIC or header["version"] != _VERSION:
                return None
            if os.fstat(opened.fileno()).st_size != _ends(header)[2]:
                return None
            end = HEADER.itemsize + header["words"]
            begin += opened.read(max(0, end - len(begin)))
        said = json.loads(begin[HEADER.itemsize : end])
    except (OSError, ValueError, IndexError):
        return None
    return Head(
        count=header["count"],
        tar_size=header["tar_size"],
        tar_mtime=header["tar_mtime"],
        tar_hash=header["tar_hash"],
        words=tuple(said["words"]),
        largest=said["largest"],
        unlabelled=said["unlabelled"],
        left_out=said["left_out"],
    )


def map_index(where: str, known: int | None = None) -> Index:
    """Raises ShardError if it is not what was written; `known`: its `body_hash`, where that was compared before."""
    try:
        whole = np.asarray(np.memmap(where, dtype=np.uint8, mode="r"))
        header = _fields(whole[: HEADER.itemsize].tobytes())
    except (OSError, ValueError, IndexError) as error:
        raise ShardError(f"{where} cannot be read ({error}): remove it, and start again") from error
    records, keys, end = _ends(header)
    body = whole[HEADER.itemsize :]
    body_hash = xxhash.xxh3_64_intdigest(body.data) if known is None else known
    if len(whole) != end or body_hash != header["body_hash"]:
        raise ShardError(f"{where} is damaged: remove it, and start again")
    return Index(
        records=whole[records:keys].view(RECORD), keys=whole[keys:], tar_hash=header["tar_hash"], body_hash=body_hash
    )


def hash_of(tar: str) -> int:
    """XXH3 of a file. Raises ShardError if it cannot be read."""
    with _reading(tar), open(tar, "rb") as opened:  # noqa: PTH123
        return _hash(opened)


@contextmanager
def _reading(tar: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(f"{tar} cannot be read ({error.strerror}): see its path and its permissions") from error


@contextmanager
def _writing(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"the index {where} cannot be written ({error.strerror}): make the folder writable, or name another in "
            "data.index_dir"
        ) from error


def _fields(begin: bytes) -> dict[str, Any]:
    """Of a header."""
    values = np.frombuffer(begin, dtype=HEADER, count=1)[0].item()
    return dict(zip(HEADER.names or (), values, strict=True))


def _ends(header: dict[str, Any]) -> tuple[int, int, int]:
    """Where records begin, where keys do, and the index ends."""
    records = -(-(HEADER.itemsize + header["words"]) // 8) * 8
    keys = records + header["count"] * RECORD.itemsize
    return records, keys, keys + header["keys"]


def _hash(opened: BinaryIO) -> int:
    opened.seek(0)
    digest = xxhash.xxh3_64()
    while chunk := opened.read(_CHUNK):
        digest.update(chunk)
    return digest.intdigest()


def _content(
    tar: Path, opened: BinaryIO, label: str | None
) -> tuple[NDArray[np.void], bytes, tuple[str, ...], dict[str, int]]:
    """(records, keys, words, what was left out)."""
    rows: list[tuple[int, ...]] = []
    keys, labels, left_out = bytearray(), list[str | None](), Counter[str]()
    for sample in samples(tar, opened):
        images = [part for part in sample.parts if f".{part}" in SUFFIXES]
        if not images:
            left_out["samples without an image"] += 1
            continue
        left_out["further images of a sample"] += len(images) - 1
        labels.append(_label(tar, opened, sample, label))
        keys += sample.key.encode(errors="surrogateescape")
        places = [sample.parts.get(part, (0, 0)) for part in (images[0], "txt", "json")]
        if max(size for _, size in places) >= _LARGEST:
            raise ShardError(f"{tar}: sample {sample.key} is larger than 4 GiB: leave it out")
        rows.append((*(offset for offset, _ in places), *(size for _, size in places), -1, len(keys)))
    records = np.array(rows, dtype=RECORD)
    records["label"], words = _numbered(labels)
    return records, bytes(keys), words, dict(+left_out)


def _numbered(labels: Sequence[str | None]) -> tuple[list[int], tuple[str, ...]]:
    """(a number for each label, the words that these are places among; none if they are what is written)."""
    every = {label for label in labels if label is not None}
    if all(label.isascii() and label.isdigit() and len(label) < 10 for label in every):
        return [-1 if label is None else int(label) for label in labels], ()
    words = tuple(sorted(every))
    places = {word: place for place, word in enumerate(words)}
    return [-1 if label is None else places[label] for label in labels], words


def _label(tar: Path, opened: BinaryIO, sample: Sample, field: str | None) -> str | None:
    """What names the class: the text of `.cls`, or a field of `.json`."""
    part = "cls" if field is None else "json"
    if part not in sample.parts:
        return None
    offset, size = sample.parts[part]
    found = os.pread(opened.fileno(), size, offset)  # headers are gone through meanwhile
    try:
        if field is None:
            return found.decode().strip() or None
        value = json.loads(found).get(field)
    except (ValueError, AttributeError) as error:
        raise ShardError(f"{tar}: {sample.key}.{part} cannot be read ({error}): write it anew") from error
    return None if value is None else str(value).strip()


def _write(
    where: str, header: NDArray[np.void], records: NDArray[np.void], keys: bytes, words: tuple[str, ...],
    left_out: dict[str, int],
) -> None:  # fmt: skip
    labels = records["label"]
    largest, unlabelled = -1 if words else int(labels.max(initial=-1)), int(np.sum(labels < 0))
    said = json.dumps({"words": words, "largest": largest, "unlabelled": unlabelled, "left_out": left_out}).encode()
    header["count"], header["keys"], header["words"] = len(records), len(keys), len(said)
    padding = bytes(-(HEADER.itemsize + len(said)) % 8)
    body = said + padding + records.tobytes() + keys
    header["body_hash"] = xxhash.xxh3_64_intdigest(body)
    with _writing(where):
        write_whole(Path(where), header.tobytes() + body)


def write_whole(where: Path, content: bytes) -> None:
    """A file: all of it or nothing, whoever else writes it. Raises OSError."""
    part = where.with_name(f".{where.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(where)
    finally:
        part.unlink(missing_ok=True)
