"""Tar files in the layout of webdataset as shards: any part of a sample is read by itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from data.errors import UnreadableImageError
from data.listing import SUFFIXES
from data.shards.formats import RECORD, Content, Format
from data.shards.members import Sample, ShardError, samples
from data.shards.store import Place, Store, few_open
from data.work import reading_bytes

CAPTION = "caption"
"""The field of a `.json` that is read where there is no `.txt`."""

_LARGEST = 2**32  # bytes of one part


@dataclass(frozen=True, kw_only=True)
class TarFormat(Format):
    """How tar files are read.

    Attributes:
        label: the field of each sample's `.json` that has its class; None: its `.cls`.
        caption: the field that has its captions, before its `.txt`, unless that is CAPTION.
    """

    label: str | None = None
    caption: str = CAPTION
    texts_in: ClassVar[Mapping[str, str]] = {"text": ".txt", "json": ".json"}

    def __post_init__(self) -> None:
        if self.label is not None and (not self.label or "/" in self.label):
            raise ValueError(f"data.label_column is {self.label!r}: give the name of a field of each sample's .json")

    @property
    def ending(self) -> str:
        """As Format."""
        return ".index" if self.label is None else f".{self.label}.index"

    @property
    def said_by(self) -> tuple[object, ...]:
        """As Format."""
        return self.caption, self.caption != CAPTION

    def content(self, file: Path, opened: BinaryIO) -> Content:
        """As Format."""
        rows: list[tuple[int, ...]] = []
        keys, labels, left_out = bytearray(), list[str | None](), Counter[str]()
        for sample in samples(file, opened):
            images = [part for part in sample.parts if f".{part}" in SUFFIXES]
            if not images:
                left_out["samples without an image"] += 1
                continue
            left_out["further images of a sample"] += len(images) - 1
            labels.append(_label(file, opened, sample, self.label))
            keys += sample.key.encode(errors="surrogateescape")
            places = [sample.parts.get(part, (0, 0)) for part in (images[0], "txt", "json")]
            if max(size for _, size in places) >= _LARGEST:
                raise ShardError(f"{file}: sample {sample.key} is larger than 4 GiB: leave it out")
            rows.append((*(offset for offset, _ in places), *(size for _, size in places), -1, len(keys)))
        records = np.array(rows, dtype=RECORD)
        return Content(records=records, keys=bytes(keys), labels=labels, left_out=+left_out)


def _label(tar: Path, opened: BinaryIO, sample: Sample, field: str | None) -> str | None:
    """What names the class: the text of `.cls`, or a field of `.json`."""
    part = "cls" if field is None else "json"
    if part not in sample.parts:
        return None
    offset, size = sample.parts[part]
    found = os.pread(opened.fileno(), size, offset)  # headers are gone through meanwhile
    try:
        if field is None:
            return found.decode().strip() or None
        value = json.loads(found).get(field)
    except (ValueError, AttributeError) as error:
        raise ShardError(f"{tar}: {sample.key}.{part} cannot be read ({error}): write it anew") from error
    return None if value is None else str(value).strip()


def captions_as_parts(said: Sequence[str]) -> dict[str, bytes]:
    """Captions as parts of a sample, by their extensions: one is a text, several are a list in a `.json`."""
    if len(said) == 1:
        return {"txt": said[0].encode()}
    return {"json": json.dumps({CAPTION: said}).encode()} if said else {}


class TarStore(Store):
    """Reads parts of samples out of tar files."""

    form: TarFormat

    def share(self, stores: int) -> None:
        """As Store."""
        super().share(stores)
        self._open = few_open(lambda shard: _Opened(self.file(shard)), stores)

    def image(self, place: Place) -> bytes:
        """As Store."""
        content = self.part(place, "image")
        assert content is not None, "samples without an image are in no index"
        return content

    def said(self, place: Place) -> list[str]:
        """As Store."""
        text = self.part(place, "text")
        if text is not None and self.form.caption == CAPTION:
            return [text.decode(errors="replace").strip()] * bool(text.strip())
        try:
            said: Any = json.loads(self.part(place, "json") or b"{}")
            said = said.get(self.form.caption, ())
        except (ValueError, AttributeError):
            said = ()
        every = [said] if isinstance(said, str) else said if isinstance(said, list) else []
        return [one.strip() for one in every if isinstance(one, str) and one.strip()]

    def texts(self, place: Place) -> dict[str, bytes]:
        """As Store."""
        found = {"txt": self.part(place, "text"), "json": self.part(place, "json")}
        return {ending: content for ending, content in found.items() if content is not None}

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
            with reading_bytes():
                found = os.pread(self._open(place.shard).descriptor, size, offset)
        except OSError as error:
            raise UnreadableImageError(f"{self.name(place)} cannot be read ({error.strerror})") from error
        if len(found) < size:
            raise UnreadableImageError(f"{self.name(place)} cannot be read: the tar file has been cut short")
        return found


class _Opened:
    """A file that is closed once nobody holds it."""

    def __init__(self, file: str) -> None:
        self.descriptor = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
