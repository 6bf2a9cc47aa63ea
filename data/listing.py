"""Which image files there are in folders, PATH/CLASS/.../IMAGE: 14 million of them in some 40 bytes each.

Names are one array of bytes with offsets. Python's objects would take 427 bytes for each file, and once more in each
worker, since counting references to them writes to the pages that fork shares.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # no names of classes


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The N image files of a folder: class by class, sorted by name within, the same on every machine.

    Attributes:
        root: the folder. classes: names of its sub-folders, in the order of their labels.
        names: uint8, all paths within root/CLASS, one after the other. ends: [N] where each path ends. labels: [N].
        left_out: how many entries were not taken, by reason.
    """

    root: str
    classes: tuple[str, ...]
    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.ends)

    def file(self, index: int) -> str:
        """Path of an image."""
        first = int(self.ends[index - 1]) if index else 0
        name = os.fsdecode(self.names[first : int(self.ends[index])].tobytes())
        return f"{self.root}/{self.classes[self.labels[index]]}/{name}"

    @property
    def fingerprint(self) -> str:
        """A hash of classes, names and their order: equal on two ranks if they see the same files."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for array in (self.names, self.ends, self.labels):
            digest.update(array.data)
        return digest.hexdigest()

    def describe(self) -> str:
        """E.g. `150 images of 6 classes in photos; left out: 3 hidden, 1 no regular file`."""
        taken = f"{len(self)} images of {len(self.classes)} classes in {self.root}"
        return f"{taken}; left out: {_reasons(self.left_out)}"


def scan(path: str, key: str) -> Listing:
    """List a folder. `key` is the name of the option that gave it.

    Raises:
        ValueError: for a folder that is missing, cannot be read, or has no classes, or a class without images.
    """
    try:
        root = Path(path).expanduser()
        return _scan(root, f"{key}={path}", key)
    except OSError as error:
        raise ValueError(
            f"{key}={path}: {error.filename} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from error
    except RuntimeError as error:  # ~nobody
        raise ValueError(f"{key}={path} cannot be found ({error}): give the folder itself") from error


def _scan(root: Path, given: str, key: str) -> Listing:
    if not root.is_dir():
        raise ValueError(f"{given} is not a folder: give one with a sub-folder of images per class")
    left_out: Counter[str] = Counter()
    identity = _identity(root)
    folders, files = _look(str(root), frozenset([identity]), left_out)
    left_out["beside the class folders"] = len(files)
    classes = tuple(sorted(folders))
    names, ends, counts = bytearray(), [np.zeros(0, dtype=np.int64)], []
    for name in classes:
        members = sorted(_images(root / name, identity, left_out))
        encoded = [os.fsencode(member) for member in members]
        ends.append(np.cumsum([len(e) for e in encoded], dtype=np.int64) + len(names))
        names += b"".join(encoded)
        counts.append(len(members))
    left_out = +left_out  # without zeros
    _check(classes, counts, given, key, left_out)
    return Listing(
        root=str(root),
        classes=classes,
        names=np.frombuffer(bytes(names), dtype=np.uint8),
        ends=np.concatenate(ends),
        labels=np.repeat(np.arange(len(classes)), counts),
        left_out=dict(left_out),
    )


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "nothing"


def _check(classes: tuple[str, ...], counts: list[int], given: str, key: str, left_out: dict[str, int]) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not classes or empty:
        missing = f"no images ({' '.join(SUFFIXES)}) in {empty}" if classes else "no sub-folders"
        raise ValueError(
            f"{given} has {missing}: images are looked for as {key}/CLASS/IMAGE; left out: {_reasons(left_out)}"
        )
    if {name.lower() for name in classes} <= _SPLITS:
        raise ValueError(
            f"{given} has the folders {', '.join(classes)}, which are parts of a data set and no classes: give "
            "the one to train on in data.path and the one held out in data.val_path"
        )


def _images(folder: Path, root: tuple[int, int], left_out: Counter[str]) -> Iterator[str]:
    """The paths, within a folder, of all images in it and below."""
    todo = [("", frozenset([root, _identity(folder)]))]
    while todo:
        within, above = todo.pop()
        folders, files = _look(f"{folder}/{within}", above, left_out)
        todo += [(f"{within}{name}/", above | {identity}) for name, identity in folders.items()]
        for name in files:
            if name.lower().endswith(SUFFIXES):
                yield within + name
            else:
                left_out["not named as images"] += 1


def _look(
    folder: str, above: frozenset[tuple[int, int]], left_out: Counter[str]
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(folders and their identity, regular files) in a folder; what is neither, or not meant, is counted.

    `above` has the identities of the folder and those that it lies in: a link to one of them would have no end.
    """
    folders, files = {}, []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.name.startswith(".") or entry.name == "__MACOSX":  # ._x.jpg, .DS_Store; a macOS archiver's
                    left_out["hidden"] += 1
                elif entry.is_file():
                    files.append(entry.name)
                elif not entry.is_dir():
                    left_out["broken links" if entry.is_symlink() else "no regular files"] += 1
                elif (identity := _identity(entry)) in above:
                    left_out["links to a folder that they lie in"] += 1
                else:
                    folders[entry.name] = identity
            except OSError:
                if not entry.is_symlink():
                    raise
                left_out["broken links"] += 1  # that lead to each other, or to where we may not look
    return folders, files


def _identity(place: Path | os.DirEntry[str]) -> tuple[int, int]:
    status = place.stat()
    return status.st_dev, status.st_ino
