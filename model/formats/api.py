"""Opening weights of any kind, and writing them as any other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.formats.base import ConversionError
from model.formats.checkpoint import CheckpointWeights
from model.formats.positions import with_table
from model.formats.registry import KINDS, PAIRS, VITRUVIUS, format_of, target
from model.formats.sources import Without, open_source
from model.formats.weights import ForeignWeights, StoredWeights, Weights, Which, matches
from model.formats.writing import (
    jobs_as,
    jobs_as_ours,
    most_bytes,
    write_checkpoint,
    write_json,
    write_npz,
    write_shards,
)
from parallel.checkpoint.manifest import FILE, CheckpointError, NoCheckpointError
from parallel.checkpoint.place import newest, sync


def open_weights(
    path: Path,
    kind: str = "auto",
    *,
    config: Path | None = None,
    given: Mapping[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    which: Which = "weights",
    only_model: bool = False,
    whole: bool = False,
) -> StoredWeights:
    """Weights of any kind, open for reading; a context manager, or to be closed by who asks for it.

    Args:
        path: of a checkpoint of this program (a step's folder, that of all steps, of a run), or of a file or folder of
            another library. kind: one of KINDS, or `auto`. config: their `config.json`, if it is not beside them.
        given: keys of the model for what they do not say. leave_out: patterns of names of tensors there that may be
            dropped. which: of a checkpoint of this program, the weights or their average.
        only_model: whatever has no part in the model may be there, and is not carried. whole: where there are two
            towers, both; else the image tower by itself, its projection as the classifier.

    Raises:
        ConversionError: there is none, it is damaged, of another kind, or has what our model has not.
    """
    if kind not in ("auto", *KINDS):
        raise ConversionError(f"kind {kind!r} is unknown: choose among {', '.join(KINDS)}")
    if (folder := _checkpoint(path, kind)) is not None:
        return CheckpointWeights(folder, which, whole=whole)
    if which != "weights":
        raise ConversionError(
            f"{path} is no checkpoint of this program: only such a one has a moving average; take the weights "
            "themselves"
        )
    source = open_source(path, config)
    form = format_of(source, kind)
    if whole:
        kept = Without(source, frozenset(name for name in source.tensors if matches(name, leave_out)))
        form = next((pair for name, pair in PAIRS.items() if name == form.kind and pair.recognises(kept)), form)
    return ForeignWeights(source, form, given=given, leave_out=leave_out, only_model=only_model)


def _checkpoint(path: Path, kind: str) -> Path | None:
    """The folder of a step that a path means, if it is of this program; None if it is something else."""
    try:
        folder = newest(path)
    except NoCheckpointError as error:
        if kind == VITRUVIUS:
            raise ConversionError(str(error)) from error
        return None
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    if kind not in ("auto", VITRUVIUS):
        raise ConversionError(f"{path} is of kind {VITRUVIUS} (it has a {FILE}), not {kind}")
    return folder


def save_weights(
    weights: Weights,
    path: Path,
    kind: str = VITRUVIUS,
    *,
    dtype: torch.dtype | None = None,
    leave_out: Sequence[str] = (),
    scan: bool = False,
) -> None:
    """Write weights as a kind: a folder, or, of big_vision, a file. It is complete, or it is not there.

    Args:
        dtype: of the tensors (default: as they are). leave_out: patterns of carried tensors that may be dropped.
        scan: of big_vision, stack the layers, as models that scan over them have them.

    Raises:
        ConversionError: the place is taken or cannot be written to, or the kind cannot express the model; then nothing
            is written.
    """
    if kind not in KINDS:
        raise ConversionError(f"kind {kind!r} is unknown: choose among {', '.join(KINDS)}")
    if kind != VITRUVIUS:
        target(kind, scan=scan, pair=weights.description.pairing is not None)
    with _complete(path) as temporary:
        if kind == VITRUVIUS:
            temporary.mkdir()
            write_checkpoint(temporary, weights, jobs_as_ours(weights, dtype))
            return
        form, weights = target(kind, scan=scan, pair=weights.description.pairing is not None), with_table(weights)
        jobs, files = jobs_as(form, weights, dtype, leave_out), form.files(weights.description)
        if form.container == "npz":
            write_npz(temporary, jobs, files)
            return
        temporary.mkdir()
        write_shards(temporary, jobs, form.container, most_bytes(kind))
        for name, values in files.items():
            write_json(temporary / name, values)


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A place to write to, which gets its name when all is written; what fails leaves nothing behind."""
    if os.path.lexists(path):
        raise ConversionError(f"{path} exists: give another place, or remove it")
    temporary = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(temporary.with_name(f"{temporary.name}.lock"), path):
            _remove(temporary)  # of one that was killed
            try:
                yield temporary
                if temporary.is_dir():
                    sync(temporary)
                temporary.rename(path)
                sync(path.parent)
            finally:
                _remove(temporary)
    except OSError as error:
        raise ConversionError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _alone(lock: Path, path: Path) -> Iterator[None]:
    """No other writes there meanwhile, where the file system has locks. Raises ConversionError if one does."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise ConversionError(f"{path} is being written by another: wait for it, or give another place") from error
    except OSError:
        pass  # not every file system has locks
    try:
        yield
    finally:
        _remove(lock)
        os.close(file)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
