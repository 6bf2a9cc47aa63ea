"""The folder of a run: checked, locked, cleared of an earlier run's files, and told where the run comes from."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from engine.errors import ConfigError, OutputError
from engine.run.journal import Journal
from parallel import comm
from parallel.comm import Axis

# What a run writes and the next one must not mix with its own.
WRITTEN = ("config.yaml", "classes.json", "metrics.jsonl", "events.out.tfevents.*", "profile")
_PROBE_BYTES = 65536  # a full disk may still have room for a name, or for a few bytes beside it
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def prepare_run_dir(run_dir: str | None) -> Path:
    """Make the folder and see that bytes can be written to it. Raises ConfigError if not."""
    if run_dir is None or not run_dir.strip():
        shown = "not set" if run_dir is None else "empty"
        raise ConfigError(f"run_dir is {shown}: give the folder for metrics and config, e.g. --run_dir runs/demo")
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            left = bytes(_PROBE_BYTES)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())  # quotas, and disks of other hosts, may refuse only now
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"run_dir {run_dir} cannot be written to ({reason}): choose a folder that can be") from error
    return path


class RunDir:
    """A folder that this run alone writes to, from here until the process ends or `close`.

    Collective. Rank 0 holds a lock of the operating system on `.lock`. It is a record lock, which ends with the
    process that took it, however that ends, and is not inherited by its data workers.

    Args:
        path: from `prepare_run_dir`. world: all ranks.

    Raises:
        ConfigError: on every rank, if another run holds the folder.
    """

    def __init__(self, path: Path, world: Axis) -> None:
        self.path, self._notes = path, list[str]()
        self._lock: int | None = None
        self._config: Journal | None = None
        refusal = self._take_lock() if world.index == 0 else None
        if (refusal := comm.gather_objects(refusal, world)[0]) is not None:
            self.close()
            raise ConfigError(refusal)

    def clear(self) -> list[str]:
        """On rank 0, once nothing can be refused any more: set an earlier run's files aside. Returns what to say of it.

        A run that goes on where an earlier one ended keeps that one's files instead.
        """
        aside = set_aside(self.path)
        return self._notes + ([f"run_dir: files of an earlier run were moved to {aside}"] if aside else [])

    def write_config(self, config: str, origin: Mapping[str, str], say: Callable[[str], None]) -> str:
        """Write `config.yaml`: the YAML text with comments at its head, which is returned."""
        text = "".join(f"# {name}: {value}\n" for name, value in origin.items()) + config
        self._config = Journal(self.path / "config.yaml", say)
        self._config.write(text.encode())
        return text

    def close(self) -> None:
        """Let others have the folder. Raises OutputError if config.yaml is not complete."""
        config, self._config = self._config, None
        try:
            if config is not None:
                config.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> str | None:
        """Why this run cannot have the folder, None if it has it."""
        path = self.path / ".lock"
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            if not stat.S_ISREG(os.fstat(self._lock).st_mode):
                return f"run_dir {self.path} cannot be locked ({path} is no file): choose another folder"
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._notes.append(
                    f"warning: the file system of {self.path} has no locks: see that no other run uses it"
                )
                return None
            if self._lock is None:
                return f"run_dir {self.path} cannot be locked ({path}: {error.strerror}): choose another folder"
            holder = os.read(self._lock, 200).decode(errors="replace").partition("\n")[0]
            return (
                f"run_dir {self.path} is in use by another run ({holder or 'it has just begun'}): "
                "wait until it has ended, or choose another folder"
            )
        os.ftruncate(self._lock, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        return None


def set_aside(run_dir: Path) -> Path | None:
    """Move what an earlier run wrote, whatever bears its names, to `earlier/1`, `earlier/2` and so on.

    Links and pipes are moved themselves: nothing is opened or followed. Returns the new folder, None if there was
    nothing. Raises OutputError where it cannot be moved.
    """
    names = sorted(name for name in (path.name for path in run_dir.iterdir()) if any(fnmatch(name, p) for p in WRITTEN))
    if not names:
        return None
    try:
        earlier = run_dir / "earlier"
        earlier.mkdir(exist_ok=True)
        taken = [int(path.name) for path in earlier.iterdir() if path.name.isdecimal()]
        folder = earlier / str(max(taken, default=0) + 1)
        folder.mkdir()
        for name in names:
            (run_dir / name).rename(folder / name)
    except OSError as error:
        raise OutputError(f"files of an earlier run in {run_dir} cannot be set aside: {error}") from error
    return folder
