"""The manifest of a checkpoint: `manifest.json`, all that there is to know beside the bytes of its tensors.

Plain JSON, one tensor a line, so that it can be read by anyone and by eye; reading it executes nothing. It ends with a
checksum of itself. `docs/checkpoints.md` describes the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from parallel.sharding.boxes import Box

FILE = "manifest.json"
FORMAT, VERSION = "vitruvius-checkpoint", 1
CHUNK_BYTES = 4 << 20  # of a piece, that have a checksum: what is read at least

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_SEAL = ',\n"checksum": "'


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read: it is damaged, incomplete, of another format, or none at all."""


def checksum(data: Any) -> str:
    """Of bytes: xxh3_64 in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


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

    def to_json(self) -> str:
        """The text of the file."""
        head = {"format": FORMAT, "format_version": VERSION, "chunk_bytes": CHUNK_BYTES, "checksums": "xxh3_64"}
        head |= {name: value for name, value in asdict(self).items() if name not in ("files", "tensors")}
        head["files"] = [file._asdict() for file in self.files]
        lines = [f"{json.dumps(name)}: {json.dumps(_plain(tensor))}" for name, tensor in sorted(self.tensors.items())]
        body = f"{json.dumps(head, indent=1)[:-2]},\n" + '"tensors": {\n' + ",\n".join(lines) + "\n}"
        return f'{body}{_SEAL}{checksum(body.encode())}"\n}}\n'


def _plain(tensor: StoredTensor) -> dict[str, Any]:
    pieces = [
        {"file": p.file, "offset": p.box.offset, "shape": p.box.shape, "start": p.start, "checksums": p.checksums}
        for p in tensor.pieces
    ]
    return {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "pieces": pieces}


def read_manifest(folder: Path) -> Manifest:
    """Of a checkpoint's folder. Raises CheckpointError if there is none that can be understood."""
    path = folder / FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint: its {FILE} cannot be read ({error.strerror})") from error
    body, seal, rest = text.rpartition(_SEAL.encode())
    try:
        values = json.loads(text)
        assert isinstance(values, dict)
    except (ValueError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON object") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of a checkpoint of this program")
    if (version := values.get("format_version")) != VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, and this program reads {VERSION}: use the program "
            "that wrote it, or a newer one"
        )
    if not seal or rest[:16].decode(errors="replace") != checksum(body):
        raise CheckpointError(f"{path} is damaged: its checksum is wrong")
    return _manifest_of(values, path)


def _manifest_of(values: Mapping[str, Any], path: Path) -> Manifest:
    if values["chunk_bytes"] != CHUNK_BYTES or values["checksums"] != "xxh3_64":
        raise CheckpointError(f"{path} has checksums of another kind ({values['checksums']})")
    tensors = {
        name: StoredTensor(
            _OF_NAME[tensor["dtype"]],
            tuple(tensor["shape"]),
            tuple(
                StoredPiece(p["file"], Box(tuple(p["offset"]), tuple(p["shape"])), p["start"], tuple(p["checksums"]))
                for p in tensor["pieces"]
            ),
        )
        for name, tensor in values["tensors"].items()
    }
    kept = {name: values[name] for name in ("step", "progress", "config", "about", "evaluation")}
    return Manifest(**kept, files=tuple(StoredFile(**file) for file in values["files"]), tensors=tensors)
