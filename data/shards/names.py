"""Which tar files a path means: bash's braces, as webdataset's shards are written, and the wildcards of glob."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_MOST = 10_000_000  # names; more is a slip of the hand


def expand(path: str, key: str) -> list[str]:
    """The files that `path` names, in its order; what wildcards find is sorted. `key` is the option that gave it.

    `{000..146}` counts (`{000..146..2}` by twos), padded with zeros as it is written; `{a,b}` is one after the other.

    Raises:
        ValueError: if that is nothing, names a file twice, or files that are not there.
    """
    given = str(Path(os.path.expanduser(path)))  # noqa: PTH111
    found: list[str] = []
    for name in _braces(given, f"{key}={path}"):
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
        if len(found) > _MOST:
            raise ValueError(f"{key}={path} names more than {_MOST} files: see the numbers in its braces")
    if not found:
        raise ValueError(f"{key}={path} matches no file: give tar files, such as shards/train-{{000000..000146}}.tar")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"{key}={path} names {twice} twice: name each shard once")
    return found


def _braces(text: str, given: str) -> Iterator[str]:
    """As the shell expands it, from the left; what is no choice is left as it is."""
    for match in _BRACES.finditer(text):
        if (choices := _choices(match[1], given)) is not None:
            for choice in choices:
                for rest in _braces(text[match.end() :], given):
                    yield text[: match.start()] + choice + rest
            return
    yield text


def _choices(inner: str, given: str) -> list[str] | None:
    counted = _RANGE.fullmatch(inner)
    if counted is None:
        return inner.split(",") if "," in inner else None
    first, last, step = int(counted[1]), int(counted[2]), int(counted[3] or 1)
    if step < 1 or abs(last - first) // step >= _MOST:
        raise ValueError(f"{given} counts {{{inner}}}: give a step of 1 or more, and no more than {_MOST} numbers")
    padded = any(number.lstrip("-").startswith("0") and len(number.lstrip("-")) > 1 for number in counted.groups()[:2])
    width = max(len(counted[1]), len(counted[2])) if padded else 0
    step = step if first <= last else -step
    return [f"{number:0{width}d}" for number in range(first, last + (1 if step > 0 else -1), step)]
