"""Tensors of a file or folder of any of the usual containers, read one at a time.

Nothing is executed: safetensors and npz hold numbers alone, and PyTorch's own files are read with `weights_only`, which
refuses all but tensors. Only one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.formats.base import ConversionError, Entry
from model.formats.npz import Npz
from model.formats.torch_files import TorchFiles
from parallel.checkpoint.manifest import checksum

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_TORCH = (".bin", ".pt", ".pth")
_SAMPLES, _SAMPLE = 64, 4096  # places in a file and bytes at each, that tell files of one length apart
_NAMES = (  # the first that is there, in transformers' order
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


class Source(Protocol):
    """Tensors by name, and the JSON files beside them.

    Attributes:
        path: what was given. tensors: of all files, in their order. files: the JSON files of the folder that describe
            the model, by name: `config.json`, `preprocessor_config.json`, `open_clip_config.json`.
        shards: the files of tensors.
    """

    path: Path
    shards: Sequence[Path]
    tensors: Mapping[str, Entry]
    files: Mapping[str, Any]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one entry of its first dim. Raises ConversionError if it cannot be read."""


def open_source(path: Path, config: Path | None = None) -> Source:
    """What is at a path: a file, or a folder with one, or with the shards of one and their index.

    Args:
        config: the `config.json` to use, where it is not beside the tensors.

    Raises:
        ConversionError: there is nothing that can be read; why, and what can be done.
    """
    try:
        folder = path if path.is_dir() else path.parent
        files = _json_files(folder, config)
        if not path.exists():
            raise ConversionError(f"{path} does not exist")
        shards = _shards(path)
        suffix = next(iter(shards)).suffix
        if suffix == ".npz":
            return Npz(path, next(iter(shards)), files)
        return (TorchFiles if suffix in _TORCH else _Safetensors)(path, shards, files)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from error


class Without:
    """A source as if some tensors were not in it."""

    def __init__(self, source: Source, left_out: frozenset[str]) -> None:
        self.path, self.shards, self.files, self.read = source.path, source.shards, source.files, source.read
        self.tensors: Mapping[str, Entry] = {name: x for name, x in source.tensors.items() if name not in left_out}


def fingerprint(source: Source) -> str:
    """A hash of what a source is: names, shapes, JSON files, and of each file its length and some of its bytes, all
    over it. Raises ConversionError if a file is gone.
    """
    found: list[Any] = [sorted(source.files.items()), list(source.tensors.items())]
    try:
        for path in source.shards:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                places = [(size - _SAMPLE) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
                found += [path.name, size, *(os.pread(file.fileno(), _SAMPLE, max(0, at)) for at in places)]
    except OSError as error:
        raise ConversionError(f"{source.path} cannot be read: {error.strerror or error}") from error
    return checksum(repr(found).encode())


def _json_files(folder: Path, config: Path | None) -> dict[str, Any]:
    found = {}
    named = {p.name: p for p in folder.glob("*.json") if p.name.endswith("config.json")} if folder.is_dir() else {}
    if config is not None:
        named["config.json"] = config
    for name, path in named.items():
        try:
            found[name] = json.loads(path.read_text())
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path} is no JSON: {error}") from error
        if not isinstance(found[name], dict):
            raise ConversionError(f"{path} is no JSON object")
    return found


def _shards(path: Path) -> list[Path]:
    """The files of tensors."""
    if path.is_file() and path.name.endswith(".index.json"):
        return _indexed(path)
    if path.is_file():
        if path.suffix not in (".safetensors", ".npz", *_TORCH):
            raise ConversionError(f"{path} is no .safetensors, .npz, .bin, .pt or .pth file, and no folder with one")
        return [path]
    for name in _NAMES:
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}.index.json").is_file():
            return _indexed(index)
    if len(indices := sorted(path.glob("*.index.json"))) == 1:
        return _indexed(indices[0])
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npz", *_TORCH) and p.is_file())
    if len(found) != 1:
        if not found:
            raise ConversionError(f"{path} is no checkpoint: it has no .safetensors, .npz, .bin, .pt or .pth file")
        raise ConversionError(f"{path} has {', '.join(p.name for p in found[:5])}: give the file that is meant")
    return found


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is no index of shards: it has no weight_map") from error
    if strange := [n for n in names if Path(n).name != n]:
        raise ConversionError(f"{index} names {strange[0]}, which is not in its folder")
    if missing := [s.name for s in shards if not s.is_file()]:
        raise ConversionError(f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(names)} files)")
    if not shards:
        raise ConversionError(f"{index} names no file")
    return shards


# -- safetensors -------------------------------------------------------------------------------------------------------


class _Safetensors:
    def __init__(self, path: Path, shards: Sequence[Path], files: Mapping[str, Any]) -> None:
        self.path, self.files, self.shards = path, files, shards
        tensors: dict[str, Entry] = {}
        self._shard: dict[str, Path] = {}
        for shard in shards:
            for name, entry in self._entries(shard).items():
                if name in tensors:
                    raise ConversionError(f"{name} is in {self._shard[name].name} and in {shard.name}")
                tensors[name], self._shard[name] = entry, shard
        self.tensors: Mapping[str, Entry] = tensors

    def _entries(self, shard: Path) -> dict[str, Entry]:
        try:
            with safe_open(shard, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
                return {
                    name: Entry(tuple(s.get_shape()), self._dtype(shard, name, s.get_dtype()))
                    for name, s in slices.items()
                }
        except SafetensorError as error:
            raise ConversionError(f"{shard} is no whole safetensors file ({error}): fetch it again") from error

    def _dtype(self, shard: Path, name: str, dtype: str) -> torch.dtype:
        if dtype not in _DTYPES:
            raise ConversionError(f"{shard}: {name} is of {dtype}, which is none of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """As Source."""
        try:  # opened anew: what is mapped goes when it is closed, and pages that were read are not held
            with safe_open(self._shard[name], framework="pt") as file:
                return file.get_tensor(name).clone() if index is None else file.get_slice(name)[index].clone()
        except SafetensorError as error:
            raise ConversionError(f"{self._shard[name]}: {name} cannot be read ({error})") from error
