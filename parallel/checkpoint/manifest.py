"""The manifest of a checkpoint: `manifest.json`, all that there is to know beside the bytes of its tensors.

Plain JSON, one tensor a line, so that it can be read by anyone and by eye; reading it executes nothing. It ends with a
checksum of itself. `docs/checkpoints.md` describes the format.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from parallel.sharding.boxes import Box, overlapping

FILE = "manifest.json"
FORMAT, VERSION = "vitruvius-checkpoint", 1
CHUNK_BYTES = 4 << 20  # of a piece, that have a checksum: what is read at least

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_SEAL, _END = ',\n"checksum": "', '"\n}\n'
_MOST_BYTES = 4 << 30  # of a manifest; it has some 25 bytes for each 4 MiB of tensors
_FILE_NAME, _CHECKSUM = re.compile(r"\w[\w.-]{0,199}", re.ASCII), re.compile(r"[0-9a-f]{16}")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read: it is damaged, incomplete, of another format, or none at all."""


class NoCheckpointError(CheckpointError):
    """There is none that this program can know: nothing at all, or something of another format."""


class UnreadableError(CheckpointError):
    """It may be whole, but cannot be read now: no permission, a file system that is away, too many open files."""


_NOW = {
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH",
        "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ECONNREFUSED", "ECONNRESET", "EAGAIN",
    )
    if hasattr(errno, name)
}  # fmt: skip


def unread(message: str, error: Exception) -> CheckpointError:
    """What an error of the operating system says of a checkpoint: that it is damaged, or out of reach for now."""
    kind = UnreadableError if isinstance(error, OSError) and error.errno in _NOW else CheckpointError
    return kind(f"{message} ({reason(error)})")


def checksum(data: Any) -> str:
    """Of bytes: xxh3_64 in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def reason(error: Exception) -> str:
    """Why something could not be read, for a message: of an OSError, or a ValueError, as of a name with a null byte."""
    return getattr(error, "strerror", None) or str(error)


def shapes_apart(name: str, stored: Sequence[int] | None, here: Sequence[int] | None) -> str:
    """How a tensor of a checkpoint is not that of a model, for a message; None: there is none of it."""
    there, ours = (list(shape) if shape is not None else "none" for shape in (stored, here))
    return f"{name}: {there} in the checkpoint, {ours} here"


class StoredPiece(NamedTuple):
    """A box of a logical tensor in a file.

    Attributes:
        file: index in `Manifest.files`. box: what it is; its elements lie row by row.
        start: of its first byte in the file. checksums: of each `CHUNK_BYTES` of it.
    """

    file: int
    box: Box
    start: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor, whose pieces cover it once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


class StoredFile(NamedTuple):
    """A safetensors file of the folder. header: checksum of its first bytes, up to the tensors' own."""

    name: str
    bytes: int
    header: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        step: after which it was saved. progress: how far the run had come, in numbers of the loop (counts, the interval
            of metrics that had begun, seconds). config: of the run, resolved, as nested groups of keys.
        about: version and commit of the code, layout, images, time: what is compared or shown, not loaded.
        evaluation: figures on held-out images at this step, empty if there was none.
        tensors: by name, in sorted order: `weights/blocks.0.in_proj.weight`.
    """

    step: int
    progress: Mapping[str, Any]
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    evaluation: Mapping[str, float] = field(default_factory=dict)
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def is_of_weights_alone(self) -> bool:
        """Whether there is no state of training beside them, as of what was converted: no run can go on from it."""
        return "optimizer.steps" not in self.tensors and not self.progress

    def to_json(self) -> str:
        """The text of the file."""
        head = {"format": FORMAT, "format_version": VERSION, "chunk_bytes": CHUNK_BYTES, "checksums": "xxh3_64"}
        head |= {name: value for name, value in asdict(self).items() if name not in ("files", "tensors")}
        head["evaluation"] = {name: figure for name, figure in self.evaluation.items() if math.isfinite(figure)}
        head["files"] = [file._asdict() for file in self.files]
        lines = [f"{json.dumps(name)}: {json.dumps(_plain(tensor))}" for name, tensor in sorted(self.tensors.items())]
        body = f"{json.dumps(head, indent=1)[:-2]},\n" + '"tensors": {\n' + ",\n".join(lines) + "\n}"
        return f"{body}{_SEAL}{checksum(body.encode())}{_END}"


def _plain(tensor: StoredTensor) -> dict[str, Any]:
    pieces = [
        {"file": p.file, "offset": p.box.offset, "shape": p.box.shape, "start": p.start, "checksums": p.checksums}
        for p in tensor.pieces
    ]
    return {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "pieces": pieces}


def read_regular(path: Path, most: int) -> bytes:
    """All of a file of at most so many bytes. Raises OSError, also if a folder, a pipe or a device is in its place."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    with open(file, "rb") as opened:  # noqa: PTH123
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(0, "it is no file")
        if about.st_size > most:
            raise OSError(0, f"{about.st_size} bytes are too many")
        return opened.read()


def read_manifest(folder: Path) -> Manifest:
    """Of a checkpoint's folder: what it says is possible, and its tensors' pieces cover them once.

    Raises:
        CheckpointError: it is damaged, of another format (then a NoCheckpointError), or out of reach (UnreadableError).
    """
    path = folder / FILE
    try:
        text = read_regular(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise unread(f"{folder} is no complete checkpoint: its {FILE} cannot be read", error) from error
    body, seal, end = text.rpartition(_SEAL.encode())
    sealed = bool(seal) and end == f"{checksum(body)}{_END}".encode()
    try:
        values = json.loads(text.decode(), object_pairs_hook=_without_doubles)
        _want(isinstance(values, dict), "it is no JSON object")
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise CheckpointError(f"{path} is damaged: it is no JSON object of different keys") from error
    perhaps = "" if sealed else ", unless it is damaged: its checksum is wrong"
    if values.get("format") != FORMAT:
        raise _other(sealed or "format" not in values, f"{path} is not of a checkpoint of this program{perhaps}")
    if (version := values.get("format_version")) != VERSION:
        known = type(version) is int and version > VERSION
        raise _other(
            sealed or known,
            f"{path} has format version {version!r:.20}, and this program reads {VERSION}: use the program "
            f"that wrote it, or a newer one{perhaps}",
        )
    if not sealed:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong")
    try:
        return _manifest_of(values)
    except _WrongError as error:
        raise CheckpointError(f"{path} is damaged, though its checksum is right: {error}") from error


def _other(foreign: bool, message: str) -> CheckpointError:
    return NoCheckpointError(message) if foreign else CheckpointError(message)


# -- what a manifest may say -------------------------------------------------------------------------------------------


class _WrongError(ValueError):
    """What is wrong with it."""


def _want(right: bool, otherwise: str) -> None:
    if not right:
        raise _WrongError(otherwise)


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    _want(len(found) == len(pairs), "a key is there twice")
    return found


def _keys(values: Any, what: str, **kinds: type) -> list[Any]:
    """The values of these keys of an object, each of its type."""
    _want(type(values) is dict, f"{what} is no object")
    for name, kind in kinds.items():
        _want(type(values.get(name)) is kind, f"{what} has no {name}, or of another type")
    return [values[name] for name in kinds]


def _numbers(values: list[Any], least: int, what: str) -> tuple[int, ...]:
    _want(all(type(value) is int and value >= least for value in values), f"{what} has a number below {least}, or none")
    return tuple(values)


def _is_shallow(values: Any, levels: int = 20) -> bool:
    inner = values.values() if type(values) is dict else values if type(values) is list else ()
    return levels > 0 and all(_is_shallow(value, levels - 1) for value in inner)


def _manifest_of(values: Mapping[str, Any]) -> Manifest:
    kinds = {"progress": dict, "config": dict, "about": dict, "evaluation": dict, "files": list, "tensors": dict}
    step, chunk, kind = _keys(values, "it", step=int, chunk_bytes=int, checksums=str)
    _want(chunk == CHUNK_BYTES and kind == "xxh3_64", f"it has checksums of another kind ({kind:.20}, {chunk} bytes)")
    _want(0 <= step < 1 << 63, "its step is not from 0 to 2^63 - 1")
    *facts, listed, tensors = _keys(values, "it", **kinds)
    _want(all(map(_is_shallow, facts)), "its groups are nested too deeply")
    _want(all(type(figure) in (int, float) for figure in facts[-1].values()), "evaluation has what is no number")
    files = tuple(_file_of(file) for file in listed)
    _want(len({file.name for file in files}) == len(files), "two files have one name")
    found = {name: _tensor_of(name, tensor, files) for name, tensor in tensors.items()}
    return Manifest(step=step, **dict(zip(kinds, (*facts, files, found), strict=True)))


def _file_of(values: Any) -> StoredFile:
    name, size, header = _keys(values, "a file", name=str, bytes=int, header=str)
    _want(bool(_FILE_NAME.fullmatch(name)) and name != FILE, f"{name!r:.80} is no name of a file of this folder")
    _want(bool(_CHECKSUM.fullmatch(header)), f"{name} has no checksum of its header")
    _want(8 <= size < 1 << 63, f"{name} has {size!r:.30} bytes")
    return StoredFile(name, size, header)


def _tensor_of(name: str, values: Any, files: Sequence[StoredFile]) -> StoredTensor:
    _want(name.isprintable() and bool(name), "the name of a tensor cannot be printed")
    dtype, shape, pieces = _keys(values, name, dtype=str, shape=list, pieces=list)
    _want(dtype in _OF_NAME, f"{name} is of {dtype!r:.20}, which is none of {', '.join(_OF_NAME)}")
    lengths = _numbers(shape, 1, f"the shape of {name}")
    found = tuple(_piece_of(name, piece, lengths, _OF_NAME[dtype].itemsize, files) for piece in pieces)
    boxes = [piece.box for piece in found]
    if (both := overlapping(boxes)) is not None:
        raise _WrongError(f"two pieces of {name} overlap, at {list(both[0].offset)} and at {list(both[1].offset)}")
    _want(sum(box.numel for box in boxes) == math.prod(lengths), f"the pieces of {name} are not all of it")
    return StoredTensor(_OF_NAME[dtype], lengths, found)


def _piece_of(name: str, values: Any, of: tuple[int, ...], size: int, files: Sequence[StoredFile]) -> StoredPiece:
    what = f"a piece of {name}"
    number, start, *lists = _keys(values, what, file=int, start=int, offset=list, shape=list, checksums=list)
    offset, shape = _numbers(lists[0], 0, what), _numbers(lists[1], 1, what)
    fits = len(offset) == len(shape) == len(of)
    _want(
        fits and all(a + b <= c for a, b, c in zip(offset, shape, of, strict=True)), f"{what} reaches out of the tensor"
    )
    _want(0 <= number < len(files), f"{what} is in a file that there is none of")
    count = math.prod(shape) * size
    _want(start >= 8 and start + count <= files[number].bytes, f"{what} reaches out of {files[number].name}")
    sums = lists[2]
    right = len(sums) == -(-count // CHUNK_BYTES) and all(type(s) is str and _CHECKSUM.fullmatch(s) for s in sums)
    _want(right, f"{what} has not a checksum for each {CHUNK_BYTES} bytes")
    return StoredPiece(number, Box(offset, shape), start, tuple(sums))
