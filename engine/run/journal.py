"""Files of a run that only grow: nothing written to them is lost silently while the process lives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from engine.errors import OutputError


class Journal:
    """A new file that bytes are appended to.

    What cannot be written (a full disk, a server that is away) is kept, told once, and tried again with every later
    write and at the end. A file that was deleted or renamed, alone or with its folder, is written anew, whole, from the
    descriptor that is still open.

    Args:
        path: must not exist. say: tells the user one line.

    Raises:
        OutputError: another file has come to stand at `path`; at the end, bytes that could still not be written.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        self._pending = b""
        self._trouble: str | None = None
        try:
            self._file = _create(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be made: {error.strerror}") from error

    def write(self, data: bytes) -> None:
        """Append."""
        self._pending += data
        try:
            self._stand_at_path()
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
            self._trouble = None
        except OSError as error:
            trouble = error.strerror or str(error)
            if trouble != self._trouble:
                self._say(f"warning: {self.path} cannot be written: {trouble}; its lines are kept and tried again")
            self._trouble = trouble

    def flush(self) -> None:
        """Nothing waits in a buffer."""

    def close(self) -> None:
        """The last try. Raises OutputError if bytes are left."""
        self.write(b"")
        if not self._pending:
            try:
                os.fsync(self._file)  # quotas, and disks of other hosts, may refuse only now
            except OSError as error:
                self._trouble = error.strerror
        os.close(self._file)
        if self._trouble is not None:
            raise OutputError(f"{self.path} is not complete: {self._trouble}")

    def _stand_at_path(self) -> None:
        """See that the open file is the one at `path`."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path.lstat(), os.fstat(self._file)):
                return
            raise OutputError(
                f"{self.path} was replaced by another file during the run: "
                "give every run a run_dir of its own, and copy the files of one that goes on instead of editing them"
            )
        whole = _content(self._file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = _create(self.path)
        os.close(self._file)
        self._file, self._pending = file, whole + self._pending
        self._say(f"warning: {self.path} was deleted or renamed during the run: it is written anew, whole")


def _create(path: Path) -> int:
    """A descriptor of a new file; a link or anything else of that name is refused, not followed."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _content(file: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as copy:
        copy.seek(0)
        return copy.read()
