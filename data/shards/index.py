"""The index of a shard: where each sample's parts lie, and a checksum of all its bytes.

A file beside the shard, little-endian: HEADER; a JSON text (the words that labels are, what was left out); zeros up to
a multiple of 8; one RECORD for each sample, mapped into memory when it is needed; the keys, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.shards.formats import RECORD, Content, Format
from data.shards.members import ShardError

_VERSION = 1
_MAGIC = b"VITSHARD"
_CHUNK = 4 * 2**20
_COPIES, _MOST_COPIES = ".copies", 1024  # a file beside an index; lines of it

HEADER = np.dtype(
    [
        ("magic", "S8"), ("version", "<u8"), ("count", "<u8"), ("keys", "<u8"), ("words", "<u8"),
        ("file_size", "<u8"), ("file_mtime", "<i8"), ("file_hash", "<u8"), ("body_hash", "<u8"),
    ]
)  # fmt: skip
"""Of the shard: bytes, nanoseconds, XXH3 of all of it. keys, words: bytes. body_hash: XXH3 of all that follows."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What opening a set needs of an index.

    Attributes:
        largest: label, where they are numbers. unlabelled: samples without one. left_out: how much, by reason.
        names: of labels that are numbers, if the shard says them. groups: as of Content.
    """

    count: int
    file_size: int
    file_mtime: int
    file_hash: int
    words: tuple[str, ...]
    largest: int
    unlabelled: int
    left_out: dict[str, int]
    names: tuple[str, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """All of an index."""

    records: NDArray[np.void]
    keys: NDArray[np.uint8]
    file_hash: int
    body_hash: int

    def key(self, row: int) -> str:
        """A sample's name within its shard."""
        first = int(self.records["key_end"][row - 1]) if row else 0
        return self.keys[first : int(self.records["key_end"][row])].tobytes().decode(errors="surrogateescape")


def place(file: str, folder: str | None, form: Format) -> str:
    """Where the index of a shard is: beside it, or in `folder`."""
    if folder is None:
        return file + form.ending
    digest = hashlib.sha256(os.fsencode(Path(file).absolute())).hexdigest()[:16]
    return os.path.expanduser(f"{folder}/{Path(file).name}.{digest}{form.ending}")  # noqa: PTH111


def make_index(file: str, where: str, form: Format) -> None:
    """Read a shard whole, once, and write its index, or nothing.

    Raises:
        ShardError: the shard is no good, or the index cannot be written.
    """
    folder = Path(where).parent
    with _writing(where):  # if it cannot be, that is found out before much is read
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    with _reading(file), open(file, "rb") as opened:  # noqa: PTH123
        status = os.fstat(opened.fileno())
        content = form.content(Path(file), opened)
        file_hash, after = _hash(opened), os.fstat(opened.fileno())
    if (status.st_size, status.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ShardError(f"{file} has changed while it was indexed: start again once nobody writes to it")
    header = np.zeros(1, dtype=HEADER)
    header["magic"], header["version"] = _MAGIC, _VERSION
    header["file_size"], header["file_mtime"], header["file_hash"] = status.st_size, status.st_mtime_ns, file_hash
    _write(where, header, content)


def note_copy(where: str, file_mtime: int, file_hash: int) -> None:
    """A shard of another time than when it was indexed has the same bytes: note that, where it can be, beside the
    index, which hosts may share that have copies of their own."""
    with suppress(OSError):
        noted = [(file_mtime, file_hash), *copies(where)][:_MOST_COPIES]
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
        file_size=header["file_size"],
        file_mtime=header["file_mtime"],
        file_hash=header["file_hash"],
        words=tuple(said["words"]),
        largest=said["largest"],
        unlabelled=said["unlabelled"],
        left_out=said["left_out"],
        names=tuple(said.get("names", ())),
        groups=tuple(said.get("groups", (header["count"],))),
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
        records=whole[records:keys].view(RECORD), keys=whole[keys:], file_hash=header["file_hash"], body_hash=body_hash
    )


def hash_of(file: str) -> int:
    """XXH3 of a file. Raises ShardError if it cannot be read."""
    with _reading(file), open(file, "rb") as opened:  # noqa: PTH123
        return _hash(opened)


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(f"{file} cannot be read ({error.strerror}): see its path and its permissions") from error


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


def _numbered(labels: Sequence[str | None]) -> tuple[list[int], tuple[str, ...]]:
    """(a number for each label, the words that these are places among; none if they are what is written)."""
    every = {label for label in labels if label is not None}
    if all(label.isascii() and label.isdigit() and len(label) < 10 for label in every):
        return [-1 if label is None else int(label) for label in labels], ()
    words = tuple(sorted(every))
    places = {word: place for place, word in enumerate(words)}
    return [-1 if label is None else places[label] for label in labels], words


def _write(where: str, header: NDArray[np.void], content: Content) -> None:
    records = content.records.copy()
    records["label"], words = _numbered(content.labels)
    said = json.dumps(
        {
            "words": words,
            "largest": -1 if words else int(records["label"].max(initial=-1)),
            "unlabelled": int(np.sum(records["label"] < 0)),
            "left_out": content.left_out,
            "names": content.names,
            "groups": content.group_ends,
        }
    ).encode()
    header["count"], header["keys"], header["words"] = len(records), len(content.keys), len(said)
    padding = bytes(-(HEADER.itemsize + len(said)) % 8)
    body = said + padding + records.tobytes() + content.keys
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
