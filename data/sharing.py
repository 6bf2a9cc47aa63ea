"""One rank of a host lists a folder, or reads a table of files; the others read what it found.

Ranks build their data sets before they talk to each other, so that a wrong folder is refused first, by the same code
on every rank. So they meet at a folder in the host's temporary directory instead: whoever locks it first lists and
writes, the others map the same pages. A lock is released by the kernel when its holder ends, so nobody waits for a rank
that is gone, however long a listing takes. Every host lists for itself: then a host that sees other files than the rest
is found out (Dataset.fingerprint), where a list that one rank sent to all would fail at the first missing file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.listing import Listing, scan

_STARTED = time.time()
"""What was written before may be of another run."""

_LATE = 600.0  # seconds that ranks of one run may start apart

Found = TypeVar("Found")


def scan_once(path: str, key: str, readers: int) -> Listing:
    """`scan(path, key)`, done by one of the `readers` processes of this host that ask for it.

    Nothing is left on disk once all have asked, or if the folder is refused (then each finds out for itself). Where the
    temporary directory cannot be used, each scans for itself, too.
    """
    return once(Listing, lambda: scan(path, key), f"{key}={Path(path).absolute()}", readers)


def once(kind: type[Found], make: Callable[[], Found], what: str, readers: int) -> Found:
    """`make()`, done by one of the `readers` processes of this host that ask for the same.

    Args:
        kind: of what is made: a dataclass whose fields are arrays and what JSON knows, lists as tuples. what: names it:
            all that it depends on.
    """
    if readers == 1:
        return make()
    named = f"{socket.gethostname()} {what}"  # hosts may share their temporary directory
    digest = hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()
    place = Path(tempfile.gettempdir()) / f"vitruvius-{os.getuid()}-{digest[:16]}"
    with _locked(place) as usable:
        if not usable:
            return make()
        return _read_or_make(kind, make, place, readers)


def _read_or_make(kind: type[Found], make: Callable[[], Found], place: Path, readers: int) -> Found:
    found, asked = _read(kind, place), _asked(place)
    try:
        if found is None:
            found = make()
            with suppress(OSError):  # a full disk: the next one makes it anew
                _write(place, found)
    except ValueError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    if asked + 1 >= readers:
        shutil.rmtree(place, ignore_errors=True)  # what is mapped stays mapped
    else:
        with suppress(OSError):
            (place / "asked").write_text(str(asked + 1))
    return found


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """The folder is there, ours alone, and locked; False: that cannot be."""
    try:
        descriptor = _lock(place)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _lock(place: Path) -> int:
    while True:
        place.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            os.close(descriptor)
            raise PermissionError(f"{place} is not ours alone")
        with suppress(FileNotFoundError):  # else the last reader has removed it meanwhile
            if os.path.samestat(status, place.stat()):
                return descriptor
        os.close(descriptor)


def _read(kind: type[Found], place: Path) -> Found | None:
    """What was made in this run, if anything was."""
    summary = place / "summary.json"
    try:
        if summary.stat().st_mtime < _STARTED:
            return None
        found: dict[str, Any] = json.loads(summary.read_bytes())
        arrays: list[str] = found.pop("arrays")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        mapped = {name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in arrays}
    except (OSError, ValueError):
        return None
    return kind(**values, **mapped)


def _asked(place: Path) -> int:
    """How many ranks have asked. One that started after a quick listing lists anew, but is counted with the others."""
    file = place / "asked"
    try:
        return int(file.read_text()) if time.time() - file.stat().st_mtime < _LATE else 0
    except (OSError, ValueError):
        return 0


def _write(place: Path, found: Any) -> None:
    (place / "summary.json").unlink(missing_ok=True)
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        file = place / f"{name}.npy"
        file.unlink(missing_ok=True)  # another run may have mapped it
        np.save(file, array)
    rest: dict[str, Any] = {name: value for name, value in values.items() if name not in arrays}
    part = place / "summary.part"
    part.write_text(json.dumps(rest | {"arrays": list(arrays)}))
    part.rename(place / "summary.json")  # last, and whole: without it nothing counts
