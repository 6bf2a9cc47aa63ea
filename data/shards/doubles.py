"""Shards that are there twice: one file by two names, or copies of one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def doubles(files: Sequence[str], hashes: NDArray[np.uint64]) -> list[tuple[str, str]]:
    """(a file, the next one of the same bytes) of all that have one. hashes: [K] of the bytes of each."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    return [(files[order[at]], files[order[at + 1]]) for at in same]


def refuse_named_twice(given: str, files: Sequence[str], hashes: NDArray[np.uint64]) -> None:
    """Raise ValueError where two names are one file's. Files of other bytes are not asked for on the file system."""
    for one, other in doubles(files, hashes):
        if os.path.samefile(one, other):  # noqa: PTH121
            raise ValueError(
                f"{given} names {one} twice, the other time as {other}: name each shard once, and see data.weights"
            )
