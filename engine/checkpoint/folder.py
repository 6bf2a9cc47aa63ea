"""The folder of all checkpoints of a run: which are complete, how one comes to be, which are kept, how one goes.

A checkpoint is `step-00001200`. It is written under a temporary name and renamed once when all of it is on the disk;
it goes by being renamed first. So a folder of that name is complete, whenever a process or the power fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.manifest import FILE, CheckpointError, Manifest, read_manifest

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY, _DELETED, _DAMAGED = ".writing", ".deleted", ".damaged"


def name_of(step: int) -> str:
    """The folder's name."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, ascending. Raises CheckpointError if it cannot be listed."""
    try:
        found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from error


def newest(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest in it, or in its `checkpoints`.

    Raises:
        CheckpointError: there is none.
    """
    if (path / FILE).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if steps := steps_in(folder):
            return folder / name_of(steps[-1])
    what = "does not exist" if not path.exists() else "is no checkpoint, and none is in it"
    raise CheckpointError(f"{path} {what}: give the folder of a step, of all steps, or of a run")


def begin(folder: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, anew."""
    temporary = folder / (name_of(step) + _TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest, and make the checkpoint what it is: complete. Raises OSError if it cannot be."""
    with (temporary / FILE).open("x", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    final = temporary.with_name(temporary.name.removesuffix(_TEMPORARY))
    temporary.rename(final)
    _sync(final.parent)
    return final


def discard(temporary: Path) -> None:
    """Remove what of a checkpoint could be written."""
    shutil.rmtree(temporary, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what saves and deletions that were cut off have left."""
    for pattern in (f"step-*{_TEMPORARY}", f"step-*{_DELETED}"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def set_damaged_aside(folder: Path, after: int) -> list[str]:
    """Rename the checkpoints of steps beyond `after`, which a run that goes on from there will write again. Returns
    their new names.
    """
    names = []
    for step in steps_in(folder):
        if step > after:
            path = folder / name_of(step)
            aside = path.with_name(path.name + _DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            names.append(aside.name)
    return names


def delete(path: Path) -> bool:
    """Delete a checkpoint, unless someone is reading it: returns whether it is gone."""
    doomed = path.with_name(path.name + _DELETED)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            manifest = stack.enter_context((path / FILE).open("rb"))
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
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def prune(folder: Path, config: CheckpointConfig) -> list[int]:
    """Delete what is not to be kept. Returns the steps that went."""
    steps = steps_in(folder)
    if config.keep is None:
        return []
    kept = set(steps[-config.keep :])
    if config.keep_every:
        kept |= {step for step in steps if step % config.keep_every == 0}
    if config.keep_best:
        kept |= set(best(folder, steps)[: config.keep_best])
    return [step for step in steps if step not in kept and delete(folder / name_of(step))]


def best(folder: Path, steps: list[int]) -> list[int]:
    """Those of the steps with an evaluation, the best first: by accuracy, else by loss; of equals, the newer."""
    found = []
    for step in steps:
        with contextlib.suppress(CheckpointError):
            if figures := read_manifest(folder / name_of(step)).evaluation:
                found.append((_merit(figures), step))
    return [step for _, step in sorted(found, reverse=True)]


def _merit(figures: Mapping[str, float]) -> float:
    return figures["accuracy"] if "accuracy" in figures else -figures["loss"]


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
