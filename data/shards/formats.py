"""What a shard is made of, and how its index is made, by its format (stores.py: how its samples are read)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype(
    [
        ("image", "<u8"), ("text", "<u8"), ("json", "<u8"),
        ("image_size", "<u4"), ("text_size", "<u4"), ("json_size", "<u4"), ("label", "<i4"), ("key_end", "<u8"),
    ]
)  # fmt: skip
"""Where a sample's parts are, by its format, 0: it has none; their bytes; its label, -1: none. That is the number which
is written there, or, unless all of the file are numbers, the place among the words, which are sorted."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The N samples of a file.

    Attributes:
        records: RECORD [N], but for the labels. keys: their names, one after the other. labels: [N] what is written
            there; None: nothing. names: of labels that are numbers, if the file says them.
        groups: samples up to and with each group of them that is read at once; one, if any sample is read by itself.
        left_out: how much, by reason.
    """

    records: NDArray[np.void]
    keys: bytes
    labels: Sequence[str | None]
    left_out: Mapping[str, int]
    names: tuple[str, ...] = ()
    groups: tuple[int, ...] | None = None

    @property
    def group_ends(self) -> tuple[int, ...]:
        return (len(self.records),) if self.groups is None else self.groups


class Format(Protocol):
    """Of all shards of a set: frozen, so that it tells what an index depends on."""

    texts_in: ClassVar[Mapping[str, str]]
    """Where captions are: fields of a RECORD, in words."""

    @property
    def ending(self) -> str:
        """What an index's name has beyond its shard's: other options give other indexes."""
        ...

    @property
    def said_by(self) -> tuple[object, ...]:
        """Options on which captions depend."""
        ...

    @property
    def taken_by(self) -> tuple[object, ...]:
        """Options on which it depends what of the bytes images and labels are; none, where these are the usual ones."""
        return ()

    def content(self, file: Path, opened: BinaryIO) -> Content:
        """Of a file. Raises ShardError for one that is no good."""
        ...
