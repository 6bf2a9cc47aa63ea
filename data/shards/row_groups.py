"""Reads samples out of parquet files: a row group's column at a time, of which the last ones are kept."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from typing import Any

import numpy as np

from data.errors import UnreadableImageError
from data.shards.catalogue import Catalogue
from data.shards.members import ShardError
from data.shards.parquet import ParquetFormat, image_bytes, opened_parquet, texts_of
from data.shards.store import Place, Store, few_open
from data.shards.tar import captions_as_parts
from data.work import reading_bytes

_KEPT = 256 * 2**20  # bytes of columns of each process, at most, or else one


class ParquetStore(Store):
    """Reads images and captions. What is asked for of one row group comes from memory after the first time, so samples
    are best drawn of few of them at a time (data.shuffle_window)."""

    form: ParquetFormat

    @property
    def hint(self) -> str:  # type: ignore[override]
        """As Store."""
        return f"; in {len(self.catalogue.group_ends)} row groups, each read whole: see data.shuffle_window"

    def __init__(self, catalogue: Catalogue, form: ParquetFormat) -> None:
        super().__init__(catalogue, form)
        self._kept = OrderedDict[tuple[int, int, str], Any]()  # columns, that was used last at last

    def share(self, stores: int) -> None:
        """As Store."""
        super().share(stores)
        self._open = few_open(lambda shard: _Opened(self.file(shard), self.form), stores)

    def image(self, place: Place) -> bytes:
        """As Store."""
        found: bytes | None = self._cell(place, "image")
        assert found, "rows without an image are in no index"
        return found

    def said(self, place: Place) -> list[str]:
        """As Store."""
        return texts_of(self._cell(place, "caption"))

    def texts(self, place: Place) -> dict[str, bytes]:
        """As Store."""
        return captions_as_parts(self.said(place))

    def _cell(self, place: Place, what: str) -> Any:
        """Of a sample's row; None: nothing is there."""
        row = int(self.index(place.shard).records["image"][place.row]) - 1
        try:
            opened = self._open(place.shard)
            group = int(np.searchsorted(opened.ends, row, side="right"))
            column = self._column(place.shard, group, what)
            return None if column is None else column[row - opened.first(group)].as_py()
        except (ShardError, IndexError) as error:
            raise UnreadableImageError(f"{self.name(place)} cannot be read: {error}") from error

    def _column(self, shard: int, group: int, what: str) -> Any:
        key = (shard, group, what)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._open(shard).column(group, what)
        self._kept[key] = found
        while len(self._kept) > 1 and sum(0 if kept is None else kept.nbytes for kept in self._kept.values()) > _KEPT:
            self._kept.popitem(last=False)
        return found


class _Opened:
    """A file that is closed once nobody holds it. ends: [G] rows up to and with each row group."""

    def __init__(self, file: str, form: ParquetFormat) -> None:
        self._stack = ExitStack()
        self._file, self._parquet = file, self._stack.enter_context(opened_parquet(file))
        self._columns = form.columns(self._parquet, file)
        metadata = self._parquet.metadata
        self.ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])

    def first(self, group: int) -> int:
        """The first row of a group."""
        return int(self.ends[group - 1]) if group else 0

    def column(self, group: int, what: str) -> Any:
        """A column of a row group; None: there is none. Raises ShardError."""
        from pyarrow import ArrowException

        columns = self._columns
        leaf = columns.image_leaf if what == "image" else columns.caption
        if leaf is None:
            return None
        try:
            with reading_bytes():
                found = self._parquet.read_row_group(group, columns=[leaf], use_threads=False).column(0)
        except (ArrowException, OSError) as error:
            raise ShardError(f"{self._file} is damaged or was cut short ({error})") from error
        return image_bytes(found, columns) if what == "image" else found

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()
