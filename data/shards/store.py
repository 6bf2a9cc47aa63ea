"""Reads samples out of tar files, each at its place."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import UnreadableImageError
from data.shards.catalogue import Catalogue
from data.shards.index import Index, map_index
from data.shards.members import ShardError

_OPEN_TARS, _MAPPED = 64, 1024  # of each process, at most; a map keeps its file open, too


class Place(NamedTuple):
    """Where a sample is."""

    shard: int
    row: int


class Store:
    """Reads parts of samples out of a catalogue's tar files. A process opens those that it needs, a few at a time."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        files = _allowed_files()
        self.index: Callable[[int], Index] = lru_cache(maxsize=min(_MAPPED, files // 8))(self._map)
        """That of a shard."""
        self._checked = dict[int, int]()  # body_hash of indexes that were mapped before
        self._open: Callable[[int], _Opened] = lru_cache(maxsize=min(_OPEN_TARS, files // 16))(
            lambda shard: _Opened(self.tar(shard))
        )

    def places(self, samples: NDArray[np.int64]) -> list[Place]:
        """Of samples by their numbers in all shards: [B]."""
        ends = self.catalogue.ends
        shards = np.searchsorted(ends, samples, side="right")
        rows = samples - np.where(shards > 0, ends[shards - 1], 0)
        return [Place(*pair) for pair in zip(shards.tolist(), rows.tolist(), strict=True)]

    def tar(self, shard: int) -> str:
        """The file's path."""
        return self.catalogue.tars[shard]

    def name(self, place: Place) -> str:
        """A sample, for whoever has to find it."""
        return f"{self.tar(place.shard)}, sample {self.index(place.shard).key(place.row)}"

    def part(self, place: Place, part: str) -> bytes | None:
        """The bytes of a part (image, text, json); None: the sample has none.

        Raises:
            UnreadableImageError: they cannot be read.
        """
        record = self.index(place.shard).records[place.row]
        offset, size = int(record[part]), int(record[f"{part}_size"])
        if not offset:
            return None
        try:
            found = os.pread(self._open(place.shard).descriptor, size, offset)
        except OSError as error:
            raise UnreadableImageError(f"{self.name(place)} cannot be read ({error.strerror})") from error
        if len(found) < size:
            raise UnreadableImageError(f"{self.name(place)} cannot be read: the tar file has been cut short")
        return found

    def words(self, places: Sequence[Place]) -> NDArray[np.int64]:
        """The samples' labels, by the catalogue's words if there are any, -1 where there is none: [B]."""
        return np.array([self._labels(shard, row) for shard, row in places], dtype=np.int64)

    def all_words(self) -> NDArray[np.int64]:
        """As `words`, of all samples."""
        return np.concatenate([self._labels(shard, slice(None)) for shard in range(len(self.catalogue.tars))])

    def _labels(self, shard: int, rows: int | slice) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self.index(shard).records["label"][rows].astype(np.int64)
        if not self.catalogue.words:
            return labels
        first = int(self.catalogue.number_ends[shard - 1]) if shard else 0
        return self.catalogue.numbers[np.where(labels < 0, -1, first + labels)]

    def _map(self, shard: int) -> Index:
        try:
            found = map_index(self.catalogue.indexes[shard], self._checked.get(shard))
        except ShardError as error:
            raise UnreadableImageError(str(error)) from error
        if found.tar_hash != int(self.catalogue.hashes[shard]):
            raise UnreadableImageError(
                f"{self.catalogue.indexes[shard]} was made anew, of other bytes, since this run began: start again"
            )
        self._checked[shard] = found.body_hash
        return found


def _allowed_files() -> int:
    """How many a process may have open: 1024 where nobody has said otherwise."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if allowed == resource.RLIM_INFINITY else allowed


class _Opened:
    """A file that is closed once nobody holds it."""

    def __init__(self, file: str) -> None:
        self.descriptor = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
