"""Parquet files in the layout of Hugging Face's datasets as shards: images within the file, read a row group at a time.

An image is a file's bytes, or a struct of `bytes` and `path`; a label a number, whose name the schema's metadata tell
(ClassLabel), or a word; a caption a text, or a list of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np

from data.shards.formats import RECORD, Content, Format
from data.shards.members import ShardError

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch
    from pyarrow.parquet import ParquetFile

CAPTION, LABEL = "caption", "label"
"""Columns that are read if they are there, without anybody's asking."""

_AT_A_TIME = 1024  # rows
_LARGEST_GROUP = 2**31  # bytes of the images of a row group, which are in memory at once


@dataclass(frozen=True)
class Columns:
    """Of one file, by name; None: there is none.

    Attributes:
        is_struct: whether the image is one, of its bytes and, if `has_path`, a path.
    """

    image: str
    is_struct: bool
    has_path: bool
    caption: str | None
    label: str | None

    @property
    def image_leaf(self) -> str:
        """The bytes of images, as parquet calls them."""
        return f"{self.image}.bytes" if self.is_struct else self.image


@dataclass(frozen=True, kw_only=True)
class ParquetFormat(Format):
    """How parquet files are read.

    Attributes:
        image, caption, label: names of columns; those called CAPTION, and LABEL for None, may be missing.

    Raises:
        ValueError: pyarrow is not installed.
    """

    image: str = "image"
    caption: str = CAPTION
    label: str | None = None
    texts_in: ClassVar[Mapping[str, str]] = {"text": "a caption"}

    def __post_init__(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"parquet files are read by pyarrow, which is not installed ({error}): pip install pyarrow, or pack "
                "them into tar files where it is (python -m tools.prepare_data pack)"
            ) from error
        for key, name in (("image", self.image), ("caption", self.caption), ("label", self.label)):
            if name is not None and (not name or "/" in name):
                raise ValueError(f"data.{key}_column is {name!r}: give the name of a column")

    @property
    def ending(self) -> str:
        """As Format."""
        names = (self.image, self.caption, LABEL if self.label is None else self.label)
        return ".index" if names == ("image", CAPTION, LABEL) else f".{'.'.join(names)}.index"

    @property
    def said_by(self) -> tuple[object, ...]:
        """As Format."""
        return (self.caption,)

    @property
    def taken_by(self) -> tuple[object, ...]:
        """As Format."""
        names = (self.image, None if self.label == LABEL else self.label)  # named or not, it is the same column
        return () if names == ("image", None) else names

    def content(self, file: Path, opened: BinaryIO) -> Content:
        """As Format."""
        rows: list[tuple[int, ...]] = []
        keys, labels, left_out, groups = bytearray(), list[str | None](), Counter[str](), list[int]()
        with opened_parquet(str(file)) as parquet:
            columns, names = self.columns(parquet, str(file)), self._names(parquet)
            row = 0
            for group in range(parquet.num_row_groups):
                _check_size(parquet, group, columns.image_leaf, file)
                for batch in _batches(parquet, group, columns):
                    for size, path, said, label in _rows(batch, columns, names, file):
                        row += 1
                        if not size:
                            left_out["rows without the bytes of an image"] += 1
                            continue
                        keys += (path or f"row {row - 1}").encode(errors="surrogateescape")
                        rows.append((row, int(said > 0), 0, size, said, 0, -1, len(keys)))
                        labels.append(label)
                groups.append(len(rows))
        return Content(
            records=np.array(rows, dtype=RECORD),
            keys=bytes(keys),
            labels=labels,
            names=names,
            groups=tuple(groups),
            left_out=left_out,
        )

    def columns(self, parquet: ParquetFile, file: str) -> Columns:
        """What is read of a file. Raises ShardError for columns that are missing, or hold something else."""
        from pyarrow import types

        schema = parquet.schema_arrow
        there = {name: schema.field(name).type for name in schema.names}

        def find(key: str, name: str, may_miss: bool, fits: Any, wanted: str) -> str | None:
            if name not in there:
                if may_miss:
                    return None
                raise ShardError(f"{file} has no column {name!r}, but {', '.join(there)}: see data.{key}_column")
            if not fits(there[name]):
                raise ShardError(f"{file}: column {name!r} is of {there[name]}, not {wanted}: see data.{key}_column")
            return name

        image = find("image", self.image, False, _is_image, "bytes, or a struct of bytes and path")
        assert image is not None
        is_struct = types.is_struct(there[image])
        given = LABEL if self.label is None else self.label
        return Columns(
            image,
            is_struct,
            is_struct and there[image].get_field_index("path") >= 0,
            find("caption", self.caption, self.caption == CAPTION, _is_said, "texts, or lists of them"),
            find("label", given, self.label is None, _is_label, "whole numbers or words"),
        )

    def _names(self, parquet: ParquetFile) -> tuple[str, ...]:
        """Of the numbers of the label column: of a ClassLabel in the metadata of Hugging Face's datasets."""
        metadata = parquet.schema_arrow.metadata or {}
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return tuple(map(str, features[LABEL if self.label is None else self.label]["names"]))
        except (KeyError, TypeError, ValueError):
            return ()


@contextmanager
def opened_parquet(file: str) -> Iterator[ParquetFile]:
    """A file, in one thread: its readers are many processes. Raises ShardError for what is no parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, pre_buffer=False) as parquet:
            yield parquet
    except (ArrowException, OSError) as error:
        raise ShardError(f"{file} is no parquet file, damaged or cut short ({error}): copy it anew") from error


def texts_of(value: Any) -> list[str]:
    """Captions that a cell has."""
    every = [value] if isinstance(value, str) else value or []
    return [one.strip() for one in every if one and one.strip()]


def image_bytes(column: Any, columns: Columns) -> Any:
    """Of a column as it was read, the files' bytes alone."""
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if columns.is_struct else column


def _batches(parquet: ParquetFile, group: int, columns: Columns) -> Iterator[RecordBatch]:
    wanted = [columns.image_leaf, *([f"{columns.image}.path"] if columns.has_path else [])]
    wanted += [name for name in (columns.caption, columns.label) if name is not None]
    yield from parquet.iter_batches(_AT_A_TIME, row_groups=[group], columns=wanted, use_threads=False)


def _rows(
    batch: RecordBatch, columns: Columns, names: tuple[str, ...], file: Path
) -> Iterator[tuple[int, str | None, int, str | None]]:
    """(bytes of the image, its path, bytes of its captions, its label) of each row."""
    import pyarrow.compute as pc

    images = batch.column(columns.image)
    sizes = pc.binary_length(image_bytes(images, columns)).to_pylist()
    nothing: list[Any] = [None] * len(sizes)
    paths = pc.struct_field(images, "path").to_pylist() if columns.has_path else nothing
    said = nothing if columns.caption is None else batch.column(columns.caption).to_pylist()
    labels = nothing if columns.label is None else batch.column(columns.label).to_pylist()
    for size, path, text, label in zip(sizes, paths, said, labels, strict=True):
        yield size or 0, path, sum(len(one.encode()) for one in texts_of(text)), _label(label, names, file)


def _label(value: Any, names: tuple[str, ...], file: Path) -> str | None:
    """What is written there; -1, as test sets have it, is none."""
    if value is None or value == -1:
        return None
    if names and not (isinstance(value, int) and 0 <= value < len(names)):
        raise ShardError(f"{file} has label {value}, and its metadata name {len(names)} classes: write it anew")
    return str(value).strip() or None


def _check_size(parquet: ParquetFile, group: int, leaf: str, file: Path) -> None:
    about = parquet.metadata.row_group(group)
    columns = [about.column(number) for number in range(about.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)
    if size > _LARGEST_GROUP:
        raise ShardError(
            f"{file}: the images of row group {group} have {size / 2**30:.3g} GiB, and any of them is read with all: "
            "write it anew with a row_group_size of some hundred rows"
        )


def _is_image(kind: DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_text(kind: DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_said(kind: DataType) -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    return _is_text(kind.value_type if is_list else kind)


def _is_label(kind: DataType) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_null(kind)) or _is_text(kind)
