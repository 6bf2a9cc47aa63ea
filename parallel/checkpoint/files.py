"""The tensors' files of a checkpoint, open for reading as they are needed."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.manifest import CheckpointError, StoredFile, checksum, unread

_MOST_OPEN = 256  # files at once; there may be as many as ranks that saved


@dataclass
class _File:
    """One that is open. users: threads that read from it now."""

    number: int
    users: int = 0


class Files:
    """Of a checkpoint's folder, by their numbers in the manifest. Its methods may be called by several threads.

    Raises:
        CheckpointError: from every method, if a file is not what it should be.
    """

    def __init__(self, folder: Path, stored: Sequence[StoredFile]) -> None:
        self._folder, self._stored = folder, stored
        self._files: OrderedDict[int, _File] = OrderedDict()  # by number, the last used last
        self._guard = threading.Lock()

    def close(self) -> None:
        """Let go of all."""
        for file in self._files.values():
            os.close(file.number)
        self._files.clear()

    def check(self, number: int) -> None:
        """It is there, a file, and as long as it was."""
        file = self._stored[number]
        path = self._folder / file.name
        try:
            about = path.stat()
        except OSError as error:
            raise unread(f"{path} is missing", error) from error
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(f"{path} is no file")
        if about.st_size != file.bytes:
            raise CheckpointError(f"{path} has {about.st_size} bytes where it had {file.bytes} when it was saved")

    def check_header(self, number: int) -> None:
        """Compare the checksum of its header."""
        stored = self._stored[number]
        path = self._folder / stored.name
        with self.opened(number) as file:
            try:
                length = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
                right = length <= stored.bytes and checksum(os.pread(file, length, 0)) == stored.header
            except OSError as error:
                raise unread(f"{path} cannot be read", error) from error
        if not right:
            raise CheckpointError(f"{path} is damaged: the checksum of its header is wrong")

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[int]:
        """The descriptor of a file; it stays open, as one of the last `_MOST_OPEN` that were used."""
        with self._guard:
            if number not in self._files:
                path = self._folder / self._stored[number].name
                try:
                    self._files[number] = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
                except OSError as error:
                    raise unread(f"{path} cannot be read", error) from error
            file = self._files[number]
            self._files.move_to_end(number)
            file.users += 1
            if len(self._files) > _MOST_OPEN:
                idle = next((n for n, other in self._files.items() if not other.users), None)
                if idle is not None:
                    os.close(self._files.pop(idle).number)
        try:
            yield file.number
        finally:
            with self._guard:
                file.users -= 1
