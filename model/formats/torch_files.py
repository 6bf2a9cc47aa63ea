"""Files of torch.save, of which only tensors are read: what else a pickle could do is refused."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.formats.base import ConversionError, Entry

_PICKLE = b"\x80"  # begins the format before torch 1.6; the one since then is a zip, which needs not be in memory
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_CURE = "load it with the program that wrote it, and save model.state_dict() with safetensors.torch.save_file"


class TorchFiles:
    """As Source."""

    def __init__(self, path: Path, shards: Sequence[Path], files: Mapping[str, Any]) -> None:
        self.path, self.files, self.shards = path, files, shards
        self._values: dict[str, Tensor] = {}
        for shard in shards:
            found = _state_dict(shard)
            if twice := sorted(found.keys() & self._values.keys()):
                raise ConversionError(f"{twice[0]} is in {shard.name} and in another file of {path}")
            self._values |= found
        self.tensors: Mapping[str, Entry] = {n: Entry(tuple(x.shape), x.dtype) for n, x in self._values.items()}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """As Source."""
        x = self._values[name]
        return (x if index is None else x[index]).clone()


def _state_dict(path: Path) -> dict[str, Tensor]:
    values = _loaded(path)
    for wrapper in _WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    if not isinstance(values, Mapping):
        raise ConversionError(f"{path} has no tensors by name, but one {type(values).__name__}")
    found: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor):
            continue
        name = str(key).removeprefix("module.")
        if name in found:
            raise ConversionError(f"{path} has {name} twice, with and without 'module.'")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ConversionError(f"{path}: {name} is sparse, quantised or empty of numbers: save it as a dense tensor")
        found[name] = value
    return found


def _loaded(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(1)
    if zipped := zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ConversionError(f"{path} is a program of TorchScript: {_CURE}")
    elif start != _PICKLE:
        raise ConversionError(f"{path} is no whole file of torch.save: fetch it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ConversionError(
            f"{path} is a pickle with more than tensors in it{f' ({named[1]})' if named else ''}, which could run any "
            f"code when it is loaded: it is not. Where you trust it, {_CURE}"
        ) from error
    except (RuntimeError, EOFError, ValueError, struct.error, KeyError, IndexError) as error:
        raise ConversionError(f"{path} is no whole file of torch.save ({error!s:.200}): fetch it again") from error
