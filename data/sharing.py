"""One rank of a host lists a folder; the others read what it found.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.listing import Listing, scan

_STARTED = time.time()
"""What was written before may be of another run."""

_LATE = 600.0  # seconds that ranks of one run may start apart

_ARRAYS = ("names", "ends", "labels")


def scan_once(path: str, key: str, readers: int) -> Listing:
    """`scan(path, key)`, done by one of the `readers` processes of this host that ask for it.

    Nothing is left on disk once all have asked, or if the folder is refused (then each finds out for itself). Where the
    temporary directory cannot be used, each scans for itself, too.
    """
    if readers == 1:
        return scan(path, key)
    what = f"{socket.gethostname()} {key}={Path(path).absolute()}"  # hosts may share their temporary directory
    digest = hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()
    place = Path(tempfile.gettempdir()) / f"vitruvius-{os.getuid()}-{digest[:16]}"
    with _locked(place) as usable:
        if not usable:
            return scan(path, key)
        return _read_or_scan(place, path, key, readers)


def _read_or_scan(place: Path, path: str, key: str, readers: int) -> Listing:
    listing, asked = _read(place), _asked(place)
    try:
        if listing is None:
            listing = scan(path, key)
            with suppress(OSError):  # a full disk: the next one scans
                _write(place, listing)
    except ValueError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    if asked + 1 >= readers:
        shutil.rmtree(place, ignore_errors=True)  # what is mapped stays mapped
    else:
        with suppress(OSError):
            (place / "asked").write_text(str(asked + 1))
    return listing


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


def _read(place: Path) -> Listing | None:
    """What was listed in this run, if anything was."""
    summary = place / "summary.json"
    try:
        if summary.stat().st_mtime < _STARTED:
            return None
        found: dict[str, Any] = json.loads(summary.read_bytes())
        arrays = {name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}
    except (OSError, ValueError):
        return None
    return Listing(root=found["root"], classes=tuple(found["classes"]), left_out=found["left_out"], **arrays)


def _asked(place: Path) -> int:
    """How many ranks have asked. One that started after a quick listing lists anew, but is counted with the others."""
    file = place / "asked"
    try:
        return int(file.read_text()) if time.time() - file.stat().st_mtime < _LATE else 0
    except (OSError, ValueError):
        return 0


def _write(place: Path, listing: Listing) -> None:
    (place / "summary.json").unlink(missing_ok=True)
    for name in _ARRAYS:
        file = place / f"{name}.npy"
        file.unlink(missing_ok=True)  # another run may have mapped it
        np.save(file, getattr(listing, name))
    part = place / "summary.part"
    part.write_text(json.dumps({"root": listing.root, "classes": listing.classes, "left_out": listing.left_out}))
    part.rename(place / "summary.json")  # last, and whole: without it nothing counts
