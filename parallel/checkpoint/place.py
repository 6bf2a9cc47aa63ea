"""Where checkpoints are: a folder each, by their steps in the folder of all, and locked while one is read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from parallel.checkpoint.manifest import FILE, CheckpointError, NoCheckpointError, reason

_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,18})", re.ASCII)


def name_of(step: int) -> str:
    """The folder's name."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, ascending. Raises CheckpointError if it cannot be listed."""
    try:
        found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
        return sorted(int(match[1]) for match, path in found if match and path.is_dir())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be listed: {reason(error)}") from error


def newest(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest in it, or in its `checkpoints`.

    Raises:
        CheckpointError: there is none (a NoCheckpointError), or the path cannot be looked at.
    """
    try:
        path.stat()
        if (path / FILE).exists():
            return path
        for folder in (path, path / "checkpoints"):
            if folder.is_dir() and (steps := steps_in(folder)):
                return folder / name_of(steps[-1])
        if path.is_dir() and _NAME.fullmatch(path.resolve().name):
            return path  # it was one, and reading it will say what is wrong
        what = "is no checkpoint, and none is in it" if path.is_dir() else "is no folder"
    except FileNotFoundError:
        what = "does not exist"
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be looked at: {reason(error)}") from error
    raise NoCheckpointError(f"{path} {what}: give the folder of a step, of all steps, or of a run")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """No run deletes this checkpoint meanwhile, where the file system has locks. Raises CheckpointError if one does."""
    manifest = None
    with contextlib.suppress(OSError, ValueError):  # reading it will say why
        manifest = os.open(path / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if manifest is not None and not _shared(manifest, path / FILE):
            raise CheckpointError(f"{path} is being deleted")
        yield
    finally:
        if manifest is not None:
            os.close(manifest)


def _shared(manifest: int, path: Path) -> bool:
    """Lock it: whether it is still the one that stands at the path."""
    try:
        fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # not every file system has locks
    try:
        return os.path.samestat(os.fstat(manifest), path.stat())
    except OSError:
        return False


def write_text(path: Path, text: str) -> None:
    """A new file, seen on the disk. Raises OSError."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """See that names in a folder outlive a power cut. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do so without being asked
            raise
    finally:
        os.close(file)
