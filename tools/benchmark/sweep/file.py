"""The file of a sweep: a JSON object per line, one per run that has ended, never lost and never half read."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import ConfigError
from tools.benchmark.table import Row

_WORDS = {
    "commit": "commit", "code": "code", "torch": "torch", "machine": "machine", "config": "configuration",
    "grid": "grid", "ranks": "number of ranks", "threads": "threads", "steps": "--steps", "warmup": "--warmup",
    "pair": "--against",
}  # fmt: skip
_START = b'{"status": '  # of each line


def read_lines(path: Path) -> list[Row]:
    """All whole lines; the last may be half written, by a process that was killed, and is left out then.

    Raises:
        ConfigError: no such file, or it is not that of a sweep.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    *whole, rest = text.split(b"\n")
    lines = []
    for number, line in enumerate([*whole, rest] if not _begins_line(rest) else whole, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"status", "sweep", "entry"} <= row.keys():
            raise ConfigError(f"{path}: line {number} is not that of a sweep: give another file")
        lines.append(row)
    return lines


def _begins_line(text: bytes) -> bool:
    """Whether this may be what a killed process has written of a line; or nothing."""
    return text.startswith(_START) or _START.startswith(text)


class SweepFile:
    """Open for one sweep, which others are kept from meanwhile.

    Args:
        identity: what all its lines belong to. fresh: keep what is there under another name, and begin anew.

    Raises:
        ConfigError: it belongs to something else; another process writes it; it is no such file.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, fresh: bool) -> None:
        self.path, self._identity = path, identity
        if fresh:
            _put_aside(path)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self.lines = read_lines(path)
            self._check()
            end = path.read_bytes().rfind(b"\n") + 1
            os.truncate(self._file, end)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> SweepFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def append(self, row: Row) -> None:
        """Add a line; it is on the disk when this returns."""
        row = {"status": row["status"], **row, "sweep": self._identity}
        data = (json.dumps(row) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.lines.append(row)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path} is being written by another sweep: wait, or give another --json") from None
        except OSError:  # a file system without locks
            pass

    def _check(self) -> None:
        if not self.lines:
            return
        theirs = self.lines[0]["sweep"]
        for key in _WORDS:
            if theirs.get(key) != self._identity.get(key):
                raise ConfigError(
                    f"{self.path} belongs to another {_WORDS[key]}, {theirs.get(key)}, not {self._identity.get(key)}: "
                    "give another --json FILE, or --fresh, which keeps this one under another name"
                )


def _put_aside(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    print(f"sweep: the earlier {path} is kept as {kept}")
