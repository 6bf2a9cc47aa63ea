"""Sources that `data.path` names: parted by ::, each of data.kind or of the kind that it begins with.

A source that names its kind may name its columns, too, where they are others than those of data.*_column:
`folder:photos::table(caption=said,label=kind):pairs.tsv::tar:shards/{000..146}.tar`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHORT = {"folder": "image_folder", "table": "image_text", "tar": "webdataset", "parquet": "parquet"}
"""Kinds as sources name them."""

COLUMNS = {
    "image_folder": (), "image_text": ("image", "caption", "label"), "webdataset": ("caption", "label"),
    "parquet": ("image", "caption", "label"),
}  # fmt: skip
"""What a source of a kind may say of itself: data.NAME_column."""

_NAMED = re.compile(rf"({'|'.join(SHORT)})(?:\(([^()]*)\))?:(.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One of them. kind: as of data.kind. columns: those that it names, by COLUMNS."""

    kind: str
    path: str
    columns: Mapping[str, str] = field(default_factory=dict)


def sources_of(path: str, kind: str, key: str) -> list[Source]:
    """Those of a path, of `kind` where they name none; `key` is the option that gave it.

    Raises:
        ValueError: for one without a path, and for columns that its kind has not.
    """
    found = []
    for part in path.split("::"):
        named = _NAMED.fullmatch(part)
        columns = {} if named is None or named[2] is None else _columns(named[2], SHORT[named[1]], f"{key}={path}")
        source = Source(kind, part) if named is None else Source(SHORT[named[1]], named[3], columns)
        if not source.path:
            raise ValueError(f"{key}={path} has a source without a path: give one on each side of :: and after a kind:")
        found.append(source)
    return found


def is_joined(sources: Sequence[Source], kind: str, shards: Sequence[str]) -> bool:
    """Whether they are more than data.kind opens by itself: one source of it, or several of shards, of its columns."""
    other = any(source.kind != kind or source.columns for source in sources)
    return other or (len(sources) > 1 and kind not in shards)


def _columns(given: str, kind: str, where: str) -> dict[str, str]:
    columns = {}
    for pair in given.split(","):
        name, _, column = (part.strip() for part in pair.partition("="))
        if name not in COLUMNS[kind] or not column:
            known = ", ".join(f"{name}=COLUMN" for name in COLUMNS[kind]) or "nothing"
            raise ValueError(f"{where}: {pair!r} is not understood: a source of this kind takes {known}")
        columns[name] = column
    return columns
