"""Images with captions that somebody has written, of a CSV or TSV file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.captions import GivenCaptions, Look, TemplateCaptions
from data.config import DataConfig
from data.datasets import fingerprint, stratified_split
from data.held_out import FOLDS
from data.image_folder import ImageFiles
from data.pairs import Columns, Pairs, read_pairs
from data.sharing import once
from data.templates import class_prompts


@dataclass(frozen=True, kw_only=True)
class WrittenCaptions(GivenCaptions):
    """The captions of the images of a table, or of those at `part`."""

    pairs: Pairs
    part: NDArray[np.int64] | None

    def every(self, index: int, label: int, look: Look) -> Sequence[str]:
        """As Captions."""
        numbers = self.pairs.captions_of(index if self.part is None else int(self.part[index]))
        return [self.pairs.caption(number) for number in numbers]

    @property
    def fingerprint(self) -> bytes:
        """As Captions."""
        classes = b"" if self.classes is None else self.classes.fingerprint
        part = b"" if self.part is None else self.part.tobytes()
        return fingerprint(self.pairs.captions_fingerprint.encode(), part, classes).encode()


class ImageText(ImageFiles):
    """The images of a table, each with one or several captions; crops and scales them as an image folder's."""

    def __init__(
        self, pairs: Pairs, image_shape: tuple[int, int, int], part: NDArray[np.int64] | None, prompts: tuple[str, ...]
    ) -> None:
        super().__init__(pairs, image_shape, part)
        classes = TemplateCaptions(names=pairs.classes, templates=prompts, class_prompts=prompts)
        self.captions = WrittenCaptions(pairs=pairs, part=part, classes=classes if pairs.classes else None)


def whole_table(config: DataConfig, key: str, image_shape: tuple[int, int, int], readers: int) -> ImageText:
    """All images of the table `config.path`, as a source among others; `key` is the option that gave it."""
    assert config.path is not None
    pairs = _read_once(config.path, key, _columns(config), None, readers)
    return ImageText(pairs, image_shape, None, class_prompts(config))


def image_text(
    config: DataConfig, image_shape: tuple[int, int, int], prompts: tuple[str, ...], readers: int = 1
) -> tuple[ImageText, ImageText]:
    """The images and captions of the table `data.path` to train on, and those of `data.val_path`, or a fold, held out.

    `prompts` are the templates by which classes are told, if there is a column of labels. `readers` processes of this
    host ask for the same: one of them reads the tables.

    Raises:
        ValueError: for tables that are missing, cannot be read, or lack columns or usable rows.
    """
    assert config.path is not None
    columns = _columns(config)
    pairs = _read_once(config.path, "data.path", columns, None, readers)
    if config.val_path is not None:
        classes = pairs.classes if columns.label is not None else None
        held_out = _read_once(config.val_path, "data.val_path", columns, classes, readers)
        return ImageText(pairs, image_shape, None, prompts), ImageText(held_out, image_shape, None, prompts)
    if len(pairs) < FOLDS:
        raise ValueError(
            f"data.path={config.path} has {len(pairs)} images with captions, too few to hold out one in {FOLDS}: add "
            "some, or give held-out ones in data.val_path"
        )
    labels = pairs.labels if pairs.classes else np.zeros_like(pairs.labels)
    train, part = stratified_split(labels, config.fold)
    return ImageText(pairs, image_shape, train, prompts), ImageText(pairs, image_shape, part, prompts)


def _columns(config: DataConfig) -> Columns:
    return Columns(image=config.image_column, caption=config.caption_column, label=config.label_column)


def _read_once(path: str, key: str, columns: Columns, classes: Sequence[str] | None, readers: int) -> Pairs:
    of_classes = hashlib.sha256(repr(classes).encode(errors="surrogateescape")).hexdigest()
    what = f"{key}={Path(path).absolute()} {columns} {of_classes}"
    return once(Pairs, lambda: read_pairs(path, key, columns, classes), what, readers)
