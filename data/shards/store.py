"""Reads samples out of shards, each at its place."""

from __future__ import annotations

import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import UnreadableImageError
from data.shards.catalogue import Catalogue
from data.shards.formats import Format
from data.shards.index import Index, map_index
from data.shards.members import ShardError

_MAPPED = 1024  # indexes of each process, at most; a map keeps its file open
_OPEN = 64  # shards of each process, at most
Opened = TypeVar("Opened")


class Place(NamedTuple):
    """Where a sample is."""

    shard: int
    row: int


class Store(ABC):
    """Samples of a catalogue's shards. A process opens those that it needs, a few at a time.

    Attributes:
        form: the format of all shards. hint: what users should know of reading them, for the start-up report.
    """

    hint = ""

    def __init__(self, catalogue: Catalogue, form: Format) -> None:
        self.catalogue, self.form = catalogue, form
        self._checked = dict[int, int]()  # body_hash of indexes that were mapped before
        self.share(1)

    def share(self, stores: int) -> None:
        """Of the files that a process may have open, keep no more than one of so many stores may."""
        most = max(1, min(_MAPPED, _allowed_files() // 8) // stores)
        self.index: Callable[[int], Index] = lru_cache(maxsize=most)(self._map)
        """That of a shard."""

    @abstractmethod
    def image(self, place: Place) -> bytes:
        """A sample's image, as a file of it has it. Raises UnreadableImageError."""

    @abstractmethod
    def said(self, place: Place) -> list[str]:
        """Its captions. Raises UnreadableImageError."""

    @abstractmethod
    def texts(self, place: Place) -> Mapping[str, bytes]:
        """What else is to be packed of it, by extensions of a tar file's parts. Raises UnreadableImageError."""

    def places(self, samples: NDArray[np.int64]) -> list[Place]:
        """Of samples by their numbers in all shards: [B]."""
        ends = self.catalogue.ends
        shards = np.searchsorted(ends, samples, side="right")
        rows = samples - np.where(shards > 0, ends[shards - 1], 0)
        return [Place(*pair) for pair in zip(shards.tolist(), rows.tolist(), strict=True)]

    def file(self, shard: int) -> str:
        """A shard's path."""
        return self.catalogue.files[shard]

    def name(self, place: Place) -> str:
        """A sample, for whoever has to find it."""
        return f"{self.file(place.shard)}, sample {self.index(place.shard).key(place.row)}"

    def words(self, places: Sequence[Place]) -> NDArray[np.int64]:
        """The samples' labels, by the catalogue's words if there are any, -1 where there is none: [B]."""
        return np.array([self._labels(shard, row) for shard, row in places], dtype=np.int64)

    def all_words(self) -> NDArray[np.int64]:
        """As `words`, of all samples."""
        return np.concatenate([self._labels(shard, slice(None)) for shard in range(len(self.catalogue.files))])

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
        if found.file_hash != int(self.catalogue.hashes[shard]):
            raise UnreadableImageError(
                f"{self.catalogue.indexes[shard]} was made anew, of other bytes, since this run began: start again"
            )
        self._checked[shard] = found.body_hash
        return found


def few_open(open_shard: Callable[[int], Opened], stores: int) -> Callable[[int], Opened]:
    """`open_shard`, which keeps those that were used last, no more than one of so many stores may have open."""
    most = max(1, min(_OPEN, _allowed_files() // 16) // stores)
    return lru_cache(maxsize=most)(open_shard)


def _allowed_files() -> int:
    """How many a process may have open: 1024 where nobody has said otherwise."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if allowed == resource.RLIM_INFINITY else allowed
