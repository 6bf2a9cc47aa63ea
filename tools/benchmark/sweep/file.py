"""The file of a sweep: a JSON object per line, one per run that has ended, never lost and never half read."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
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


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_times(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(time) and time > 0 for time in value)


def _may_be_number(value: Any) -> bool:
    return value is None or _is_number(value)


_OF_ALL: dict[str, Callable[[Any], bool]] = {
    "sweep": lambda value: isinstance(value, dict) and value.keys() >= _WORDS.keys(),
    "entry": _is(dict), "config_hash": _is(str), "ranks": _is(int), "config": _is(dict),
    "threads": _is(int, type(None)),
}  # fmt: skip
_OF_STATUS: dict[Any, dict[str, Callable[[Any], bool]]] = {
    "skipped": {"why": _is(str)},
    "failed": {"why": _is(str), "round": _is(int)},
    "done": {
        "round": _is(int), "turns": _is(str),
        "environment": lambda value: isinstance(value, dict) and "threads" in value,
        "grid_p_d_c_t": _is(str), "global_batch": _is_number, "images_per_second": _is_number,
        "tflops_per_device": _may_be_number, "mfu": _may_be_number, "mfu_of_measured_gemm": _may_be_number,
        "peak_memory_MiB_per_rank": _is_number, "communication_share": _may_be_number,
        "step_seconds": _are_times, "step_cpu_seconds": _are_times,
        "yardstick_seconds": _are_times, "yardstick_cpu_seconds": _are_times,
    },
}  # fmt: skip
"""What a line has, and of what kind."""


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
        except (ValueError, RecursionError):
            row = None
        if (wrong := _wrong(row)) is not None:
            raise ConfigError(f"{path}: line {number} is not that of a sweep{wrong}: give another file")
        lines.append(row)
    return lines


def _begins_line(text: bytes) -> bool:
    """Whether this may be what a killed process has written of a line; or nothing."""
    return text.startswith(_START) or _START.startswith(text)


def _wrong(row: Any) -> str | None:
    """What a line lacks; None if nothing."""
    if not isinstance(row, dict) or not isinstance(status := row.get("status"), str) or status not in _OF_STATUS:
        return ""
    wanted = {**_OF_ALL, **_OF_STATUS[status]}
    wrong = next((key for key, is_right in wanted.items() if key not in row or not is_right(row[key])), None)
    if wrong is not None:
        return f", whose {wrong} is missing or wrong"
    if status == "done" and any(
        len(row[f"yardstick{kind}"]) != len(row[f"step{kind}"]) + 1 for kind in ("_seconds", "_cpu_seconds")
    ):
        return ", whose yardstick was not laid on once more than there are steps"
    return None


def runs_of(lines: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs that have been made, by their layout's hash."""
    runs: dict[str, list[Row]] = {}
    for line in lines:
        if line["status"] == "done":
            runs.setdefault(line["config_hash"], []).append(line)
    return runs


def failures(lines: Sequence[Row]) -> list[Row]:
    """Of each round of each layout the last line that says it has failed, unless it has been made since."""
    last: dict[tuple[str, int], Row] = {}
    for line in lines:
        if line["status"] != "skipped":
            last[line["config_hash"], line["round"]] = line
    return [line for line in last.values() if line["status"] == "failed"]


class SweepFile:
    """Open for one sweep, which others are kept from meanwhile.

    Args:
        identity: what all its lines belong to. fresh: keep what is there under another name, and begin anew.

    Raises:
        ConfigError: it belongs to something else; another process writes it; it is no such file.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool) -> None:
        self.path, self._identity = path, dict(identity)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._lock()
            if fresh:
                self._put_aside()
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
        for theirs in (line["sweep"] for line in self.lines):
            for key in _WORDS:
                if theirs[key] != self._identity.get(key):
                    raise ConfigError(
                        f"{self.path} belongs to another {_WORDS[key]}, {theirs[key]}, not {self._identity.get(key)}: "
                        "give another --json FILE, or --fresh, which keeps this one under another name"
                    )

    def _put_aside(self) -> None:
        """Copied, not renamed: the file that is locked stays the one of this name."""
        if not self.path.stat().st_size:
            return
        number = 1
        while (kept := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
            number += 1
        try:
            shutil.copy2(self.path, kept)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be kept as {kept}: {error.strerror}") from error
        os.truncate(self._file, 0)
        print(f"sweep: the earlier {self.path} is kept as {kept}")
