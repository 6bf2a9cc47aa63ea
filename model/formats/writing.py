"""Weights as files: tensor by tensor, the next read while the one before is written."""

from __future__ import annotations

import functools
import itertools
import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from model.formats.base import ConversionError
from model.formats.checkpoint import about_of
from model.formats.pairs import config_of
from model.formats.rules import expected, place_of
from model.formats.weights import CARRIED, Format, Weights, matches
from parallel.checkpoint.manifest import FILE, Manifest, StoredFile, StoredPiece, StoredTensor
from parallel.checkpoint.place import write_text
from parallel.checkpoint.write import FileEntry, as_bytes, write_tensors
from parallel.sharding.boxes import whole_box

CONFIG = "config.yaml"
SHARD_BYTES = 5_000_000_000  # of a file, of tensors
_ONE_FILE = {"timm", "open_clip"}  # libraries that read no shards
_SHOWN = 10


@dataclass(frozen=True)
class Job:
    """Some tensors that are made at once: how they are called, and they, when they are asked for."""

    entries: tuple[FileEntry, ...]
    make: Callable[[], Sequence[Tensor]]

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(entry.bytes for entry in self.entries)


def jobs_as_ours(weights: Weights, dtype: torch.dtype | None = None) -> list[Job]:
    """For a checkpoint of this program, with what is carried."""

    def job(prefix: str, name: str, shape: tuple[int, ...], kind: torch.dtype, read: Callable[[str], Tensor]) -> Job:
        return Job((FileEntry(prefix + name, shape, kind),), lambda: [_as(read(name), kind, name)])

    jobs = [job("weights/", n, e.shape, dtype or e.dtype, weights.read) for n, e in weights.tensors.items()]
    jobs += [job(CARRIED, n, e.shape, e.dtype, weights.read_carried) for n, e in weights.carried.items()]
    return _in_order(jobs)


def jobs_as(
    form: Format, weights: Weights, dtype: torch.dtype | None = None, leave_out: Sequence[str] = ()
) -> list[Job]:
    """For another library's checkpoint.

    Raises:
        ConversionError: it cannot express the model, or would lose tensors that are carried for a third one.
    """
    origin = weights.description.origin
    back = origin is not None and origin.kind == form.kind
    lost = [] if back else [name for name in weights.carried if not matches(name, leave_out)]
    if lost and origin is not None:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ConversionError(
            f"{form.title} has no place for what came from {origin.kind}: {', '.join(lost[:_SHOWN])}{more} "
            "(--leave_out PATTERN drops it)"
        )
    jobs = []
    for rule in form.rules(weights.description):
        kind = dtype or (weights.tensors[rule.ours].dtype if rule.ours else _usual_dtype(weights))
        if not rule.theirs:  # nothing is written of it, so it must be what the other library takes it for
            rule.to_theirs(rule.joined(weights.read))
        shapes = expected([rule], {name: weights.tensors[name].shape for name in rule.names})

        def make(rule: Any = rule, kind: torch.dtype = kind) -> list[Tensor]:
            made = rule.to_theirs(rule.joined(weights.read))
            return [_as(x, kind, name) for name, x in zip(rule.theirs, made, strict=True)]

        jobs.append(Job(tuple(FileEntry(name, shape, kind) for name, shape in shapes.items()), make))
    for name, entry in weights.carried.items() if back else ():
        kept = FileEntry(name, entry.shape, entry.dtype)
        jobs.append(Job((kept,), lambda name=name: [weights.read_carried(name)]))  # type: ignore[misc]
    return _in_order(_stacks([job for job in jobs if job.entries]))


def _stacks(jobs: Sequence[Job]) -> list[Job]:
    """With the entries of a stack (`rules.entry`) one after the other and of one dtype, each made alone: a tensor that
    goes into several stacks is read once for each, so that no stack is in memory."""
    out, stacks = [], dict[str, dict[int, tuple[Job, int]]]()
    for job in jobs:
        for k, e in enumerate(job.entries):
            stack, index = place_of(e.key)
            if index is not None:
                stacks.setdefault(stack, {})[index] = (job, k)
        if place_of(job.entries[0].key)[1] is None:
            out.append(job)
    for parts in stacks.values():
        entries = [parts[i][0].entries[parts[i][1]] for i in range(len(parts))]
        dtype = functools.reduce(torch.promote_types, [e.dtype for e in entries])
        for i, e in enumerate(entries):
            job, k = parts[i]
            make = functools.partial(_made_alone, job, k, dtype)
            out.append(Job((e._replace(dtype=dtype),), make))
    return out


def _made_alone(job: Job, k: int, dtype: torch.dtype) -> list[Tensor]:
    return [job.make()[k].to(dtype)]


def _as(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In a dtype. Raises ConversionError where a number would become infinite."""
    y = x.to(dtype)
    if dtype.itemsize < x.dtype.itemsize and int(y.isinf().sum()) != int(x.isinf().sum()):
        raise ConversionError(
            f"{name} has numbers up to {float(x.abs().max()):.3g}, beyond the {torch.finfo(dtype).max:.3g} of "
            f"{str(dtype).removeprefix('torch.')}: use bf16, or leave out --dtype"
        )
    return y


def _usual_dtype(weights: Weights) -> torch.dtype:
    return next(iter(weights.tensors.values())).dtype


def _in_order(jobs: Sequence[Job]) -> list[Job]:
    """Wide numbers first, so that all are aligned in a file."""
    return sorted(jobs, key=lambda job: -job.entries[0].dtype.itemsize)


def tensors_of(jobs: Iterable[Job]) -> Iterator[Tensor]:
    """All of them in order; a job's are made while those of the one before are used."""
    with ThreadPoolExecutor(1, "convert") as pool:
        following = None
        for job in jobs:
            current, following = following, pool.submit(job.make)
            if current is not None:
                yield from current.result()
                del current  # its tensors go before the job after the next is made
        if following is not None:
            yield from following.result()


def _shards(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.bytes
    return shards


def _entries(jobs: Iterable[Job]) -> list[FileEntry]:
    return [entry for job in jobs for entry in job.entries]


def most_bytes(kind: str) -> int:
    """Of a file of a kind: those of libraries that read no shards are as large as the model."""
    return sys.maxsize if kind in _ONE_FILE else SHARD_BYTES


def write_shards(folder: Path, jobs: Sequence[Job], stem: str, most: int = SHARD_BYTES) -> None:
    """As safetensors: one file, or, where there is more than `most` bytes, several and an index."""
    shards = _shards(jobs, most)
    count = len(shards)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, _entries(shard), tensors_of(shard), {"format": "pt"})
    if count > 1:
        places = {e.key: name for name, shard in zip(names, shards, strict=True) for e in _entries(shard)}
        index = {"metadata": {"total_size": sum(job.bytes for job in jobs)}, "weight_map": places}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, values: Any) -> None:
    """Two spaces deep, as these libraries write it."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_checkpoint(folder: Path, weights: Weights, jobs: Sequence[Job], most: int = SHARD_BYTES) -> None:
    """As a checkpoint of this program, of weights alone; beside it the configuration of its model, for runs of it."""
    files: list[StoredFile] = []
    tensors: dict[str, StoredTensor] = {}
    for number, shard in enumerate(_shards(jobs, most)):
        written = write_tensors(folder / f"weights-{number:05d}.safetensors", _entries(shard), tensors_of(shard), {})
        files.append(written.file)
        for entry, place in zip(_entries(shard), written.tensors, strict=True):
            piece = StoredPiece(number, whole_box(entry.shape), *place)
            tensors[entry.key] = StoredTensor(entry.dtype, entry.shape, (piece,))
    d = weights.description
    config = config_of(d)
    about = {"converted_from": weights.kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **about_of(d)}
    manifest = Manifest(
        step=getattr(weights, "step", 0), progress={}, config=config, about=about, files=tuple(files), tensors=tensors
    )
    write_text(folder / CONFIG, yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
    write_text(folder / FILE, manifest.to_json())


def write_npz(path: Path, jobs: Sequence[Job], files: Mapping[str, Any] | None = None) -> None:
    """As a zip of .npy files, not compressed, so that they can be mapped; bf16 as JAX stores it, two bytes of no type.

    Args:
        jobs: the entries of a stack in a row, each a job. files: what is to be known beside the tensors, as the
            comment of the zip, which numpy does not look at.
    """
    parts = tensors_of(jobs)
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for entry in _whole(_entries(jobs)):
            with archive.open(f"{entry.key}.npy", "w", force_zip64=True) as member:
                member.write(_npy_header(entry))
                left = entry.bytes
                while left > 0:
                    data = as_bytes(next(parts))
                    member.write(data.data)
                    left -= data.nbytes
                assert left == 0, entry
        if files:
            archive.comment = json.dumps(files).encode()
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _whole(entries: Sequence[FileEntry]) -> Iterator[FileEntry]:
    for stack, group in itertools.groupby(entries, lambda e: place_of(e.key)[0]):
        parts = list(group)
        stands = parts[0].shape if place_of(parts[0].key)[1] is None else (len(parts), *parts[0].shape)
        yield FileEntry(stack, stands, parts[0].dtype)


def _npy_header(entry: FileEntry) -> bytes:
    types = {torch.bfloat16: "|V2"}
    descr = types.get(entry.dtype) or np.dtype(str(entry.dtype).removeprefix("torch.")).str
    text = repr({"descr": descr, "fortran_order": False, "shape": tuple(entry.shape)}).encode("latin1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
