"""The folder of all checkpoints of a run: which are complete, how one comes to be, which are kept, how one goes.

A checkpoint is `step-00001200`. It is written under a temporary name and renamed once when all of it is on the disk;
it goes by being renamed first. So a folder of that name is complete, whenever a process or the power fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint.config import CheckpointConfig
from parallel.checkpoint.manifest import FILE, CheckpointError, Manifest, read_manifest
from parallel.checkpoint.place import name_of, steps_in, sync, write_text

SEEN = ".seen-by-all-"  # begins the name of what ranks look for to see that they have one folder
_TEMPORARY, _DELETED, _DAMAGED = ".writing", ".deleted", ".damaged"


def temporary_path(folder: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return folder / (name_of(step) + _TEMPORARY)


def final_path(temporary: Path) -> Path:
    """What it is called when it is complete."""
    return temporary.with_name(temporary.name.removesuffix(_TEMPORARY))


def begin(folder: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, anew; what else stands where it is to be is set aside."""
    path = temporary_path(folder, step)
    _remove(path)
    if os.path.lexists(final_path(path)):
        _set_aside(final_path(path))
    path.mkdir(parents=True)
    return path


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest, and make the checkpoint what it is: complete. Raises OSError if it cannot be."""
    write_text(temporary / FILE, manifest.to_json())
    sync(temporary)
    path = final_path(temporary)
    temporary.rename(path)
    sync(path.parent)
    with contextlib.suppress(PermissionError):  # to list it
        sync(path.parent.parent)  # where the folder of all may be new
    return path


def discard(temporary: Path) -> None:
    """Remove what of a checkpoint could be written."""
    _remove(temporary)


def clean(folder: Path) -> None:
    """Remove what saves and deletions that were cut off have left."""
    for pattern in (f"step-*{_TEMPORARY}", f"step-*{_DELETED}", f"{SEEN}*"):
        for path in folder.glob(pattern):
            _remove(path)


def set_damaged_aside(folder: Path, after: int) -> list[str]:
    """Rename the checkpoints of steps beyond `after`, which a run that goes on from there will write again. Returns
    their new names.
    """
    names = []
    for step in steps_in(folder):
        if step > after:
            names.append(_set_aside(folder / name_of(step)).name)
    return names


def _set_aside(path: Path) -> Path:
    """Rename it, to a name that is free."""
    aside, count = path.with_name(path.name + _DAMAGED), 1
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f"{path.name}{_DAMAGED}-{count}")
    path.rename(aside)
    return aside


def delete(path: Path) -> bool:
    """Delete a checkpoint, unless someone is reading it: returns whether it is gone."""
    doomed = path.with_name(path.name + _DELETED)
    _remove(doomed)  # an earlier one
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of a damaged one: nobody reads it
            manifest = _open_to_lock(path / FILE)
            stack.callback(os.close, manifest)
            try:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until renamed
            except BlockingIOError:
                return False
            except OSError:
                pass  # not every file system has locks
        try:
            path.rename(doomed)
        except OSError:
            return False
    _remove(doomed)
    return True


def _open_to_lock(path: Path) -> int:
    """For writing, where that is allowed: network file systems lock nothing alone that is open for reading only."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError:
        return os.open(path, os.O_RDONLY | flags)


def prune(folder: Path, config: CheckpointConfig) -> tuple[list[int], list[int]]:
    """Delete what is not to be kept. Returns the steps that went, and those that could not go."""
    steps = steps_in(folder)
    if config.keep is None:
        return [], []
    kept = set(steps[-config.keep :])
    if config.keep_every:
        kept |= {step for step in steps if step % config.keep_every == 0}
    if config.keep_best:
        kept |= set(best(folder, steps)[: config.keep_best])
    gone = {step: delete(folder / name_of(step)) for step in steps if step not in kept}
    return [step for step, went in gone.items() if went], [step for step, went in gone.items() if not went]


def best(folder: Path, steps: list[int]) -> list[int]:
    """Those of the steps with an evaluation, the best first: by accuracy, else by loss; of equals, the newer."""
    found = []
    for step in steps:
        with contextlib.suppress(CheckpointError):
            if (merit := _merit(read_manifest(folder / name_of(step)).evaluation)) is not None:
                found.append((merit, step))
    return [step for _, step in sorted(found, reverse=True)]


def _merit(figures: Mapping[str, float]) -> tuple[bool, float] | None:
    for name, sign in (("accuracy", 1.0), ("loss", -1.0)):
        if math.isfinite(figure := figures.get(name, math.nan)):
            return name == "accuracy", sign * figure
    return None


def _remove(path: Path) -> None:
    """A folder and all in it, or a link or a file, as far as that can be."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
