"""The store that reads the samples of shards, by their format."""

from __future__ import annotations

from data.shards.catalogue import Catalogue
from data.shards.formats import Format
from data.shards.parquet import ParquetFormat
from data.shards.row_groups import ParquetStore
from data.shards.store import Store
from data.shards.tar import TarFormat, TarStore


def store_of(catalogue: Catalogue, form: Format) -> Store:
    """One that opens a catalogue's shards, all of that format."""
    match form:
        case TarFormat():
            return TarStore(catalogue, form)
        case ParquetFormat():
            return ParquetStore(catalogue, form)
    raise AssertionError(f"{form} has no store")
