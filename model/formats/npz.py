"""A zip of numpy's arrays: those that are not compressed are mapped, the others read."""

from __future__ import annotations

import ast
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.formats.base import ConversionError, Entry, Shape


class Npz:
    """As Source; the comment of the zip is read too, if it is JSON."""

    def __init__(self, path: Path, file: Path, files: Mapping[str, Any]) -> None:
        self.path, self.files, self._file = path, files, file
        self.shards: Sequence[Path] = [file]
        self._places: dict[str, tuple[int, Shape, np.dtype[Any]]] = {}  # of the first byte; -1: compressed
        try:
            with zipfile.ZipFile(file) as archive:
                self.files = {**files, **_comment(archive)}
                for info in archive.infolist():
                    name = info.filename.removesuffix(".npy")
                    with archive.open(info) as member:
                        shape, dtype, length = _npy_header(member, f"{file}: {name}")
                    if info.file_size != length + math.prod(shape) * dtype.itemsize:
                        raise ConversionError(f"{file}: {name} has not as many bytes as its shape: fetch it again")
                    if name in self._places:
                        raise ConversionError(f"{file} has two arrays {name}")
                    stored = info.compress_type == zipfile.ZIP_STORED
                    self._places[name] = (self._start(info) + length if stored else -1, shape, dtype)
        except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError, zlib.error) as error:
            raise ConversionError(f"{file} is no whole npz file ({error}): fetch it again") from error
        self.tensors: Mapping[str, Entry] = {
            name: Entry(shape, _torch_dtype(dtype, f"{file}: {name}"))
            for name, (_, shape, dtype) in self._places.items()
        }

    def _start(self, info: zipfile.ZipInfo) -> int:
        with self._file.open("rb") as raw:
            raw.seek(info.header_offset + 26)
            names, extra = struct.unpack("<HH", raw.read(4))
        return int(info.header_offset) + 30 + int(names) + int(extra)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """As Source."""
        start, shape, dtype = self._places[name]
        try:
            if start < 0:
                with np.load(self._file, allow_pickle=False) as archive:
                    values = archive[name]
            else:
                values = np.memmap(self._file, dtype, "r", start, shape) if shape else np.fromfile(
                    self._file, dtype, 1, offset=start
                ).reshape(())  # fmt: skip
            part = np.array(values if index is None else values[index])
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConversionError(f"{self._file}: {name} cannot be read ({error}): fetch it again") from error
        return _from_numpy(part)


def _comment(archive: zipfile.ZipFile) -> Mapping[str, Any]:
    """What this program wrote beside the tensors; another's comment says nothing to it."""
    try:
        values = json.loads(archive.comment)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


_MOST_HEADER = 10_000  # bytes, as numpy has it


def _npy_header(member: Any, what: str) -> tuple[Shape, np.dtype[Any], int]:
    """(shape, dtype, bytes of the header) of a .npy file. Raises ConversionError for objects, which are pickles."""
    magic = member.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise ConversionError(f"{what} is no array")
    size = 2 if magic[6] == 1 else 4
    length = int.from_bytes(member.read(size), "little")
    if length > _MOST_HEADER:
        raise ConversionError(f"{what} is no array: its header would have {length} bytes")
    try:
        header = ast.literal_eval(member.read(length).decode("latin1"))
        dtype, shape, fortran = np.dtype(header["descr"]), tuple(header["shape"]), header["fortran_order"]
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape}")
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise ConversionError(f"{what} is no array ({error})") from error
    if dtype.hasobject:
        raise ConversionError(f"{what} is an array of objects, a pickle, which could run any code when it is loaded")
    if fortran:
        raise ConversionError(f"{what} is stored column by column: save it again with numpy.ascontiguousarray")
    return shape, dtype, 8 + size + length


def _torch_dtype(dtype: np.dtype[Any], what: str) -> torch.dtype:
    try:
        return _from_numpy(np.empty(0, dtype)).dtype
    except TypeError as error:
        raise ConversionError(f"{what} is an array of {dtype}, which torch has no name for") from error


def _from_numpy(values: np.ndarray[Any, Any]) -> Tensor:
    values = np.ascontiguousarray(values).reshape(values.shape)
    if values.dtype.str == "|V2" and values.dtype.names is None:  # JAX's bfloat16, which numpy does not know
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
