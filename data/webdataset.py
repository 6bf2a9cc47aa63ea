"""Images in shards, tar files in the layout of webdataset or parquet, read at random places by an index beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.captions import GivenCaptions, Look, TemplateCaptions
from data.config import DataConfig
from data.datasets import Dataset, fingerprint
from data.decode import check_channels, decode, sides
from data.errors import BadSampleError
from data.held_out import FOLDS, Part
from data.scaling import Finish
from data.shards.catalogue import Catalogue, open_shards
from data.shards.classes import Classes, classes_of
from data.shards.formats import Format
from data.shards.parquet import ParquetFormat
from data.shards.store import Place, Store
from data.shards.stores import store_of
from data.shards.tar import TarFormat
from data.sharing import once
from data.showing import read_file
from data.templates import class_prompts


class WebDataset(Dataset):
    """The samples of a catalogue, or those of `part`; crops and scales them as an image folder's."""

    crops_when_read = True
    tells_sides = True

    def __init__(
        self, store: Store, image_shape: tuple[int, int, int], part: Part | None, classes: Classes | None
    ) -> None:
        check_channels(image_shape[0])
        self.store, self.part, self.classes, self.image_shape = store, part, classes, image_shape
        self.num_classes = 0 if classes is None else classes.count
        self.class_names = None if classes is None else classes.names
        ends = store.catalogue.group_ends, store.catalogue.source_ends
        self.shard_ends, self.source_ends = ends if part is None else map(part.before, ends)

    @property
    def source(self) -> str:
        return self.store.catalogue.describe() + self.store.hint

    def __len__(self) -> int:
        return len(self.store.catalogue) if self.part is None else len(self.part)

    @property
    def fingerprint(self) -> str:
        """Of all bytes of all shards, their order, where sources end, what labels mean, which samples are taken, and
        what else the format says."""
        catalogue, taken_by = self.store.catalogue, self.store.form.taken_by
        sources = [catalogue.source_ends.tobytes()] if len(catalogue.source_ends) > 1 else []
        sources += [repr(taken_by).encode(errors="surrogateescape")] if taken_by else []
        names = repr((catalogue.words, self.num_classes, self.class_names, self.part)).encode(errors="surrogateescape")
        return fingerprint(catalogue.hashes.tobytes(), catalogue.ends.tobytes(), names, *sources)

    @cached_property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Of all samples, which takes 8 bytes for each: training asks for `labels_of`."""
        if self.classes is None:
            return np.arange(len(self))
        labels = self.classes.labels(self.store.all_words())
        return labels if self.part is None else labels[self.part.samples(np.arange(len(self)))]

    def labels_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices if self.classes is None else self.classes.labels(self.store.words(self.places(indices)))

    def places(self, indices: NDArray[np.int64]) -> list[Place]:
        """Where samples of this set are."""
        return self.store.places(indices if self.part is None else self.part.samples(indices))

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        images = np.empty((len(indices), *self.image_shape), dtype=np.float32)
        for row, place in enumerate(self.places(indices)):
            content, name = BytesIO(self.store.image(place)), partial(self.store.name, place)
            own, done = None if crop is None else crop[row], None if finish is None else finish.of([row])
            images[row] = read_file(content, own, self.image_shape, self.showing, name, done)
        return torch.from_numpy(images)

    def sides(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        places = self.places(indices)
        found = [sides(BytesIO(self.store.image(place)), partial(self.store.name, place)) for place in places]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def read_sized(self, index: int, crop: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        (place,) = self.places(np.array([index]))
        return decode(BytesIO(self.store.image(place)), crop, shape, partial(self.store.name, place))


@dataclass(frozen=True, kw_only=True)
class ShardCaptions(GivenCaptions):
    """The captions of the samples of a set, as its shards have them."""

    dataset: WebDataset

    def every(self, index: int, label: int, look: Look) -> Sequence[str]:
        """As Captions. Raises BadSampleError for a sample of which nothing is said."""
        (place,) = self.dataset.places(np.array([index]))
        store = self.dataset.store
        if not (found := store.said(place)):
            where = " nor ".join(store.form.texts_in.values())
            raise BadSampleError(
                f"{store.name(place)} has no caption ({where}): write its shard anew without it, or see "
                "data.caption_column"
            )
        return found

    @property
    def fingerprint(self) -> bytes:
        """As Captions."""
        classes = b"" if self.classes is None else self.classes.fingerprint
        return repr((self.dataset.fingerprint, *self.dataset.store.form.said_by, classes)).encode()


def whole_shards(config: DataConfig, key: str, image_shape: tuple[int, int, int], readers: int) -> WebDataset:
    """All samples of the shards `config.path`, as a source among others; `key` is the option that gave it."""
    assert config.path is not None
    store = _opened(config, _format(config), config.path, key, readers)
    (classes,) = classes_of([store.catalogue])
    found = WebDataset(store, image_shape, None, classes)
    found.captions = _captions(found, class_prompts(config))
    return found


def webdataset(
    config: DataConfig, image_shape: tuple[int, int, int], prompts: tuple[str, ...], readers: int = 1
) -> tuple[WebDataset, WebDataset]:
    """The samples of the shards `data.path` to train on, and those of `data.val_path`, or a fold, held out.

    `prompts` are the templates by which classes are told. `readers` processes of this host ask for the same: one of
    them looks at the shards, and indexes those that have no index.

    Raises:
        ValueError: for shards that are missing, cut short, changed, or cannot be read, and labels that do not fit.
    """
    assert config.path is not None
    form = _format(config)
    stores = [_opened(config, form, config.path, "data.path", readers)]
    parts: list[Part | None] = [None, None]
    if config.val_path is not None:
        stores.append(_opened(config, form, config.val_path, "data.val_path", readers))
    else:
        size = len(stores[0].catalogue)
        if size < FOLDS:
            raise ValueError(
                f"data.path={config.path} has {size} images, too few to hold out one in {FOLDS}: add some, or give "
                "held-out ones in data.val_path"
            )
        parts = [Part(size, config.fold, is_held_out) for is_held_out in (False, True)]
    classes = classes_of([store.catalogue for store in stores])
    train, held_out = (
        WebDataset(store, image_shape, part, of_store)
        for store, part, of_store in zip(stores * (2 // len(stores)), parts, classes * (2 // len(stores)), strict=True)
    )
    for dataset in (train, held_out):
        dataset.captions = _captions(dataset, prompts)
        if dataset.captions is not None and config.templates is not None:
            raise ValueError(
                f"data.templates has no effect with data.path={config.path}, whose samples have captions: leave it out"
            )
    return train, held_out


def _format(config: DataConfig) -> Format:
    if config.kind == "parquet":
        return ParquetFormat(image=config.image_column, caption=config.caption_column, label=config.label_column)
    return TarFormat(label=config.label_column, caption=config.caption_column)


def _opened(config: DataConfig, form: Format, path: str, key: str, readers: int) -> Store:
    folder = config.index_dir
    what = f"{key}={Path(path).absolute()} {form} {folder}"
    return store_of(once(Catalogue, partial(open_shards, path, key, form=form, folder=folder), what, readers), form)


def _captions(dataset: WebDataset, prompts: tuple[str, ...]) -> ShardCaptions | None:
    """None: of the first sample nothing is said, so the set is one of classes."""
    of_classes = None
    if dataset.class_names is not None:
        of_classes = TemplateCaptions(names=tuple(dataset.class_names), templates=prompts, class_prompts=prompts)
    if not dataset.store.said(dataset.places(np.array([0]))[0]):
        return None
    return ShardCaptions(dataset=dataset, classes=of_classes)
