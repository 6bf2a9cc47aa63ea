"""What can be packed: image folders, tables of images and captions, other shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np

from data.errors import UnreadableImageError
from data.listing import SUFFIXES, Listing, scan
from data.pairs import Columns, Pairs, read_pairs
from data.shards.catalogue import open_shards
from data.shards.classes import class_map
from data.shards.formats import Format
from data.shards.parquet import ParquetFormat
from data.shards.store import Store
from data.shards.stores import store_of
from data.shards.tar import TarFormat, captions_as_parts

_NAME = 60  # characters of a file's name that are kept in a key


class Source(Protocol):
    """Samples by number."""

    classes: tuple[str, ...]
    """Names of the labels; none, if they have no names."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of what sample i is."""
        ...

    def sample(self, index: int) -> tuple[str, Mapping[str, bytes]]:
        """(a name, the parts of a sample by their extensions, the image first)."""
        ...


@dataclass(frozen=True)
class FolderSource(Source):
    """PATH/CLASS/IMAGE files."""

    listing: Listing

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.listing.classes

    @property
    def fingerprint(self) -> str:
        return self.listing.fingerprint

    def sample(self, index: int) -> tuple[str, Mapping[str, bytes]]:
        """As Source."""
        file = Path(self.listing.file(index))
        return file.stem, {file.suffix[1:].lower(): file.read_bytes(), "cls": b"%d" % self.listing.labels[index]}


@dataclass(frozen=True)
class TableSource(Source):
    """Rows of images and captions."""

    pairs: Pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.pairs.classes

    @property
    def fingerprint(self) -> str:
        return self.pairs.fingerprint + self.pairs.captions_fingerprint

    def sample(self, index: int) -> tuple[str, Mapping[str, bytes]]:
        """As Source."""
        file = Path(self.pairs.file(index))
        content = file.read_bytes()
        suffix = file.suffix.lower()
        parts = {suffix[1:] if suffix in SUFFIXES else _ending(content, str(file)): content}
        if self.classes:
            parts["cls"] = b"%d" % self.pairs.labels[index]
        parts.update(captions_as_parts([self.pairs.caption(number) for number in self.pairs.captions_of(index)]))
        return file.stem, parts


@dataclass(frozen=True)
class ShardSource(Source):
    """Shards, to be cut otherwise or shuffled."""

    store: Store
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.store.catalogue)

    @property
    def fingerprint(self) -> str:
        """As Source: of other columns of the same files other samples are packed."""
        return self.store.catalogue.hashes.tobytes().hex() + self.store.form.ending.removesuffix(".index")

    def sample(self, index: int) -> tuple[str, Mapping[str, bytes]]:
        """As Source."""
        store, words = self.store, self.store.catalogue.words
        (place,) = store.places(np.array([index]))
        content = store.image(place)
        parts = {_ending(content, store.name(place)): content}
        label = int(store.words([place])[0])
        if label >= 0:
            parts["cls"] = (words[label] if words else str(label)).encode()
        parts.update(store.texts(place))
        return store.index(place.shard).key(place.row).rpartition("/")[2], parts


def format_of(path: str, columns: Columns) -> Format:
    """What files a path of shards names, by its suffix."""
    if Path(path).suffix.lower() == ".parquet":
        return ParquetFormat(image=columns.image, caption=columns.caption, label=columns.label)
    return TarFormat(label=columns.label, caption=columns.caption)


def source_of(path: str, columns: Columns) -> Source:
    """What a path holds: a folder, a table or parquet files by its suffix, else tar files.

    Raises:
        ValueError: nothing that can be read.
    """
    if Path(path).expanduser().is_dir():
        return FolderSource(scan(path, "SRC"))
    if Path(path).suffix.lower() in (".csv", ".tsv", ".tab"):
        return TableSource(read_pairs(path, "SRC", columns, None))
    form = format_of(path, columns)
    catalogue = open_shards(path, "SRC", form=form, folder=None)
    return ShardSource(store_of(catalogue, form), class_map(catalogue) or ())


def key_of(number: int, name: str) -> str:
    """A key that sorts by number, is in no other sample, and has a file's name for whoever looks for it."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
    return f"{number:09d}_{readable[:_NAME]}"  # ASCII: a tar file has room for 100 bytes


def _ending(content: bytes, name: str) -> str:
    """By what the image is, not by its name. Raises UnreadableImageError for what no shard may have."""
    from PIL import Image

    try:
        with Image.open(BytesIO(content)) as image:
            found = (image.format or "").lower()
    except OSError as error:
        raise UnreadableImageError(f"{name} is no image that can be read: leave it out, or mend it") from error
    ending = {"jpeg": "jpg", "mpo": "jpg"}.get(found, found)
    if f".{ending}" not in SUFFIXES:
        raise UnreadableImageError(f"{name} is an image of format {found}: convert it to one of {', '.join(SUFFIXES)}")
    return ending
