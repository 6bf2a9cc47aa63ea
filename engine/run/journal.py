"""Files of a run that only grow: nothing written to them is lost silently while the process lives."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from engine.errors import OutputError
from parallel.checkpoint.place import sync


class Journal:
    """A file that bytes are appended to: a new one, or one that goes on.

    What cannot be written (a full disk, a server that is away) is kept, told once, and tried again with every later
    write and at the end. A file that was deleted or renamed, alone or with its folder, is written anew, whole, from the
    descriptor that is still open.

    Args:
        path: must not exist, unless the file goes on. say: tells the user one line.
        goes_on: with what is in the file that is there; where there is none, one line says that it begins here.

    Raises:
        OutputError: another file, or what is no regular file, has come to stand at `path`; at the end, bytes that could
            still not be written.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, goes_on: bool = False) -> None:
        self.path, self._say = path, say
        self._pending = b""
        self._trouble: str | None = None
        try:
            found = _open(path) if goes_on else None
            self._file = _create(path) if found is None else found
        except OSError as error:
            raise OutputError(f"{path} cannot be {'gone on with' if goes_on else 'made'}: {error.strerror}") from error
        if goes_on and found is None:
            say(f"there is no {path} of an earlier start: a new one begins here")

    def write(self, data: bytes) -> None:
        """Append."""
        self._pending += data
        self._try()

    def sync(self) -> None:
        """See that what was written outlives a power cut; a disk that refuses is told as for `write`."""
        self._try(to_disk=True)

    def move(self, path: Path) -> None:
        """Take the place of the file at `path` at once, complete. Raises OutputError where that cannot be."""
        try:
            self.sync()
            if self._trouble is not None:
                raise OutputError(f"{self.path} is not complete: {self._trouble}")
            self.path.rename(path)
            self.path = path
            sync_folder(path.parent)
        except OSError as error:
            raise OutputError(f"{path} cannot be written anew: {error.strerror}") from error

    def flush(self) -> None:
        """Nothing waits in a buffer."""

    def close(self) -> None:
        """The last try. Raises OutputError if bytes are left."""
        self.sync()  # quotas, and disks of other hosts, may refuse only now
        os.close(self._file)
        if self._trouble is not None:
            raise OutputError(f"{self.path} is not complete: {self._trouble}")

    def _try(self, to_disk: bool = False) -> None:
        """Write what waits; `to_disk`: beyond the caches of the operating system."""
        try:
            self._stand_at_path()
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
            if to_disk:
                os.fsync(self._file)
            self._trouble = None
        except OSError as error:
            trouble = error.strerror or str(error)
            if trouble != self._trouble:
                self._say(f"warning: {self.path} cannot be written: {trouble}; its lines are kept and tried again")
            self._trouble = trouble

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


def sync_folder(path: Path) -> None:
    """See that names in a folder outlive a power cut, where its file system can do that."""
    with contextlib.suppress(OSError):
        sync(path)


def _create(path: Path) -> int:
    """A descriptor of a new file; a link or anything else of that name is refused, not followed."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    sync_folder(path.parent)
    return file


def _open(path: Path) -> int | None:
    """A descriptor of the regular file at `path`, None where there is nothing; what is no file is refused unopened, or
    at least unread: a pipe does not block.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no file")
    return file


def _content(file: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as copy:
        copy.seek(0)
        return copy.read()
