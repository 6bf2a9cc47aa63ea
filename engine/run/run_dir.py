"""The folder of a run: checked, locked, and told where the run comes from. An earlier run's files are set aside, those
of a run that goes on are cut back to where it does.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import glob
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from engine.errors import ConfigError, OutputError
from engine.run.board import EVENTS
from engine.run.journal import Journal, sync_folder
from engine.run.rewind import rewind, whole_lines, whole_records
from parallel import comm
from parallel.comm import Axis

# What a run writes and the next one must not mix with its own; pictures of the run are by its user.
BAD_SAMPLES = "bad_samples.jsonl"
_FILES = ("config.yaml", "classes.json", "metrics.jsonl", BAD_SAMPLES, EVENTS)
ATTENTION = "attention"
WRITTEN = (*_FILES, ATTENTION, "profile", "hang", "plot.png", "timeline.png", "checkpoints/step-*")
_PROBE_BYTES = 65536  # a full disk may still have room for a name, or for a few bytes beside it
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def prepare_run_dir(run_dir: str | None) -> Path:
    """Make the folder and see that bytes can be written to it. Raises ConfigError if not."""
    if run_dir is None or not run_dir.strip():
        shown = "not set" if run_dir is None else "empty"
        raise ConfigError(f"run_dir is {shown}: give the folder for metrics and config, e.g. --run_dir runs/demo")
    return prepare_folder(Path(run_dir), "run_dir")


def prepare_folder(path: Path, key: str) -> Path:
    """Make a folder and see that bytes can be written to it. Raises ConfigError, with the key that names it, if not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            left = bytes(_PROBE_BYTES)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())  # quotas, and disks of other hosts, may refuse only now
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{key} {path} cannot be written to ({reason}): choose a folder that can be") from error
    return path


class RunDir:
    """A folder that this run alone writes to, from here until the process ends or `close`.

    Collective. Rank 0 holds a lock of the operating system on `.lock`. It is a record lock, which ends with the
    process that took it, however that ends, and is not inherited by its data workers.

    Args:
        path: from `prepare_run_dir` or `prepare_folder`. world: all ranks. key: that names the folder.

    Raises:
        ConfigError: on every rank, if another run holds the folder.
    """

    def __init__(self, path: Path, world: Axis, key: str = "run_dir") -> None:
        self.path, self._key, self._notes = path, key, list[str]()
        self._lock: int | None = None
        self._config: Journal | None = None
        refusal = self._take_lock() if world.index == 0 else None
        if (refusal := comm.gather_objects(refusal, world)[0]) is not None:
            self.close()
            raise ConfigError(refusal)

    def clear(self) -> list[str]:
        """On rank 0, once nothing can be refused any more: set an earlier run's files aside. Returns what to say of it.

        A run that goes on calls `go_on` instead.
        """
        aside = set_aside(self.path)
        return self._notes + ([f"run_dir: files of an earlier run were moved to {aside}"] if aside else [])

    def go_on(self, step: int, *, traces: bool = False) -> list[str]:
        """On rank 0, once nothing can be refused any more: cut off what was written after `step`, by an attempt that
        was lost. Returns what to say of it.

        What bears a name of ours and is no file is set aside. Others' traces are, too, if this run `traces` steps.
        """
        odd = [name for pattern in _FILES for name in _names(self.path, pattern) if not _is_file(self.path / name)]
        aside = set_aside(self.path, [glob.escape(name) for name in odd] + ["profile"] * traces)
        notes = [f"run_dir: {', '.join(odd)}: no file, moved to {aside}"] if odd else []
        for name in _names(self.path, EVENTS):
            rewind(self.path / name, whole_records, step)
        for name in _names(self.path, f"{ATTENTION}/step-*"):
            number = name.rpartition("-")[2].partition(".")[0]
            if number.isdecimal() and int(number) > step and _is_file(self.path / name):
                try:
                    (self.path / name).unlink()
                except OSError as error:
                    raise OutputError(f"{self.path / name} cannot be removed: {error.strerror}") from error
        if _is_file(bad := self.path / BAD_SAMPLES):
            rewind(bad, whole_lines, step)
        if _is_file(metrics := self.path / "metrics.jsonl"):
            kept, more = rewind(metrics, whole_lines, step)
            lost = f"; {more} bytes of later steps, which were lost, are cut off" if more else ""
            where = f"after its line of step {kept.step}" if kept.step else f"without lines up to step {step}"
            notes.append(f"run_dir: metrics.jsonl goes on {where}{lost}")
        return self._notes + notes

    def write_config(self, config: str, origin: Mapping[str, str], say: Callable[[str], None]) -> str:
        """Write `config.yaml`: the YAML text with comments at its head, which is returned.

        It takes the place of an earlier one at once, which is kept in `earlier/N` if it has other keys or values.
        """
        text = "".join(f"# {name}: {value}\n" for name, value in origin.items()) + config
        path, written = self.path / "config.yaml", self.path / ".config.yaml.new"
        try:
            if _is_file(path) and _keys(path.read_bytes()) != _keys(text.encode()):
                kept = _new_earlier(self.path) / path.name
                shutil.copyfile(path, kept)
                say(f"run_dir: the configuration is another than at the last start, which is kept as {kept}")
            written.unlink(missing_ok=True)  # of a start that was killed here
        except OSError as error:
            raise OutputError(f"{path} cannot be kept: {error}") from error
        self._config = Journal(written, say)
        self._config.write(text.encode())
        self._config.move(path)
        return text

    def write_classes(self, text: str, say: Callable[[str], None]) -> None:
        """Write `classes.json`, unless it says the same already."""
        path = self.path / "classes.json"
        if _is_file(path) and path.read_bytes() == text.encode():
            return
        set_aside(self.path, [path.name])
        file = Journal(path, say)
        file.write(text.encode())
        file.close()

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
                return f"{self._key} {self.path} cannot be locked ({path} is no file): choose another folder"
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._notes.append(
                    f"warning: the file system of {self.path} has no locks: see that no other run uses it"
                )
                return None
            if self._lock is None:
                return f"{self._key} {self.path} cannot be locked ({path}: {error.strerror}): choose another folder"
            holder = os.read(self._lock, 200).decode(errors="replace").partition("\n")[0]
            return (
                f"{self._key} {self.path} is in use by another run ({holder or 'it has just begun'}): "
                "wait until it has ended, or choose another folder"
            )
        os.ftruncate(self._lock, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        return None


def set_aside(folder: Path, patterns: Sequence[str] = WRITTEN) -> Path | None:
    """Move what an earlier run wrote, whatever bears its names, to `earlier/1`, `earlier/2` and so on.

    Links and pipes are moved themselves: nothing is opened or followed. Folders without anything in them stay. Returns
    the new folder, None if there was nothing. Raises OutputError where it cannot be moved.
    """
    try:
        names = sorted({name for pattern in patterns for name in _names(folder, pattern)})
        names = [name for name in names if not _is_empty_folder(folder / name)]
        if not names:
            return None
        aside = _new_earlier(folder)
        for name in names:
            (aside / name).parent.mkdir(exist_ok=True)
            (folder / name).rename(aside / name)
        sync_folder(aside)
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"files of an earlier run in {folder} cannot be set aside: {error}") from error
    return aside


def _new_earlier(folder: Path) -> Path:
    """The next of `earlier/1`, `earlier/2` and so on, made."""
    earlier = folder / "earlier"
    earlier.mkdir(exist_ok=True)
    taken = [int(path.name) for path in earlier.iterdir() if path.name.isdecimal()]
    new = earlier / str(max(taken, default=0) + 1)
    new.mkdir()
    return new


def _names(folder: Path, pattern: str) -> list[str]:
    """What is in the folder under such names, whatever it is; nothing where there is no folder, or where the folder of
    the pattern is a link: what it leads to may be on another disk.
    """
    if "/" in pattern:
        within, _, rest = pattern.partition("/")
        return [] if (folder / within).is_symlink() else [f"{within}/{name}" for name in _names(folder / within, rest)]
    return fnmatch.filter([path.name for path in folder.iterdir()], pattern) if folder.is_dir() else []


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _keys(config: bytes) -> object:
    """What a configuration says, without its comments; None where it cannot be read."""
    try:
        return yaml.safe_load(config)
    except (yaml.YAMLError, ValueError):  # ValueError: no text, or no number or date
        return None
