"""What is in a tar file in the layout of webdataset: files that follow each other and share a name up to its first dot.

`a/7.jpg`, `a/7.cls`, `a/7.json` are one sample, `a/7`; its parts are called by what follows the first dot of the last
component, in lower case (webdataset's `base_plus_ext` and `group_by_keys`). Names that begin with a dot or have none,
and `__meta__`, are no samples.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__(?:$|/)")
_BLOCK = 512
_CHUNK = 4 * 2**20
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class ShardError(ValueError):
    """A tar file cannot be used, or is no longer what it was: the message names it, the cause and the cure."""


@dataclass
class Sample:
    """A sample's key, and its parts: (offset in the tar file, bytes) by extension."""

    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


def samples(tar: Path, opened: BinaryIO) -> Iterator[Sample]:
    """The samples of a tar file, in their order. Reads headers alone; long names of GNU tar and pax are understood.

    Raises:
        ShardError: it is no tar file, compressed, damaged or cut short, or has what cannot be read at random places.
    """
    _refuse_compressed(tar, opened)
    seen: set[int] = set()  # hashes of keys
    sample: Sample | None = None
    for member in _members(tar, opened):
        named = _NAME.fullmatch(member.name)
        if named is None or _META.match(member.name):
            continue
        key, part = named[1], named[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if hash(key) in seen:
                raise ShardError(
                    f"{tar}: the files of sample {key} do not follow each other: write it anew, sorted by name "
                    "(tar --sort=name)"
                )
            seen.add(hash(key))
            sample = Sample(key)
        if part in sample.parts:
            raise ShardError(f"{tar} has {member.name} twice: write it anew with one file of each name")
        sample.parts[part] = member.offset_data, member.size
    if sample is not None:
        yield sample


def _members(tar: Path, opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Regular files."""
    opened.seek(0)
    try:
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else all are kept
                if member.issparse():
                    raise ShardError(f"{tar}: {member.name} is stored with holes: write it anew without tar --sparse")
                if member.islnk() or member.issym():
                    raise ShardError(f"{tar}: {member.name} is a link: write it anew with tar -h --hard-dereference")
                if member.isreg():
                    yield member
            end = archive.offset
    except tarfile.TarError as error:
        raise ShardError(f"{tar} is no tar file, damaged or cut short ({error}): copy it anew") from error
    _check_end(tar, opened, end)


def _check_end(tar: Path, opened: BinaryIO, end: int) -> None:
    """A tar file ends with zeros: what the reader takes for the end may be damage, or the middle of joined files."""
    opened.seek(end)
    if (block := opened.read(_BLOCK)) != bytes(_BLOCK):
        what = "is cut short" if len(block) < _BLOCK else "is damaged"
        raise ShardError(f"{tar} {what} at byte {end}, where a file or the end of all should be: copy it anew")
    while rest := opened.read(_CHUNK):
        if rest.count(0) != len(rest):
            raise ShardError(f"{tar} goes on after its end at byte {end}: join tar files by tar -A, not by cat")


def _refuse_compressed(tar: Path, opened: BinaryIO) -> None:
    opened.seek(0)
    begin = opened.read(8)
    for magic, cure in _COMPRESSED.items():
        if begin.startswith(magic):
            raise ShardError(f"{tar} is compressed, so that nothing in it can be read by itself: {cure} it")
