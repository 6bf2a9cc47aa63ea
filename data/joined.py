"""Sources of several kinds as one set: image folders, tables, tar files, parquet files, one after the other.

Each source has its own way to its images, labels and captions; the set has their numbers end to end, one list of
classes, and what is said of a sample is what its source says. Shapes: B samples, N of the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.captions import Captions, Look, TemplateCaptions
from data.config import DataConfig
from data.datasets import Dataset, fingerprint
from data.held_out import FOLDS, Part
from data.image_folder import whole_folder
from data.image_text import whole_table
from data.scaling import Finish
from data.shards.doubles import refuse_named_twice
from data.showing import Showing
from data.source_names import sources_of
from data.templates import captions_of, class_prompts, class_words
from data.webdataset import WebDataset, whole_shards


@dataclass(frozen=True, kw_only=True)
class JoinedClasses:
    """One list of classes for several sources.

    Attributes:
        count: of classes; 0: a source has none, so the set has none. names: of each, if they have names.
        numbers: of each source, the label here of each of its labels; None: labels are the same.
    """

    count: int
    names: tuple[str, ...] | None
    numbers: tuple[NDArray[np.int64], ...] | None


class Joined(Dataset):
    """Samples of sources end to end, or those of `part`."""

    crops_when_read = True
    tells_sides = True

    def __init__(self, sources: Sequence[Dataset], classes: JoinedClasses, part: Part | None) -> None:
        self.sources, self.classes, self.part = tuple(sources), classes, part
        self.image_shape = sources[0].image_shape
        self.num_classes, self.class_names = classes.count, classes.names
        self._ends = np.cumsum([len(source) for source in sources])
        self._firsts = self._ends - [len(source) for source in sources]
        shards = [
            first + (np.array([len(source)]) if source.shard_ends is None else source.shard_ends)
            for first, source in zip(self._firsts, sources, strict=True)
        ]  # what lies in no shards counts as one
        ends = np.concatenate(shards)
        self.shard_ends = ends if part is None else part.before(ends)
        self.source_ends = self._ends if part is None else part.before(self._ends)

    @property
    def source(self) -> str:
        return "\n  ".join(source.source or "" for source in self.sources)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.part is None else len(self.part)

    @property
    def fingerprint(self) -> str:
        """Of all sources, their order, what labels mean, and which samples are taken."""
        names = repr((self.num_classes, self.class_names, self.part)).encode(errors="surrogateescape")
        return fingerprint(*(source.fingerprint.encode() for source in self.sources), self._ends.tobytes(), names)

    @cached_property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Of all samples, which takes 8 bytes for each: training asks for `labels_of`."""
        return self.labels_of(np.arange(len(self)))

    def labels_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.num_classes:
            return indices
        labels = np.empty_like(indices)
        for number, rows, own in self._by_source(indices):
            of_source = self.sources[number].labels_of(own)
            labels[rows] = of_source if self.classes.numbers is None else self.classes.numbers[number][of_source]
        return labels

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        images = torch.empty(len(indices), *self.image_shape)
        for number, rows, own in self._by_source(indices):
            some, done = None if crop is None else crop[rows], None if finish is None else finish.of(rows)
            images[torch.from_numpy(rows)] = self.sources[number].read(own, some, done)
        return images

    def sides(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.empty((len(indices), 2), dtype=np.int64)
        for number, rows, own in self._by_source(indices):
            found[rows] = self.sources[number].sides(own)
        return found

    def read_sized(self, index: int, crop: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        number, own = self.place(index)
        return self.sources[number].read_sized(own, crop, shape)

    def place(self, index: int) -> tuple[int, int]:
        """(source, index in it) of a sample."""
        ((number, _, own),) = self._by_source(np.array([index]))
        return number, int(own[0])

    def show(self, showing: Showing | None) -> None:
        for source in self.sources:
            source.show(showing)

    def _by_source(self, indices: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """(source, which of `indices` are its own, their indices in it) of each source that there is one of."""
        samples = indices if self.part is None else self.part.samples(indices)
        numbers = np.searchsorted(self._ends, samples, side="right")
        found = []
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            found.append((number, rows, samples[rows] - self._firsts[number]))
        return found


@dataclass(frozen=True, kw_only=True)
class JoinedCaptions(Captions):
    """What sources say of their samples. classes: what can be said of the classes of all, if there are any."""

    dataset: Joined
    of_sources: tuple[Captions, ...]
    classes: TemplateCaptions | None

    def one(self, index: int, label: int, look: Look, choices: NDArray[np.float32], turn: int = 0) -> str:
        """As Captions."""
        number, own = self.dataset.place(index)
        return self.of_sources[number].one(own, self._label(number, own), look, choices, turn)

    def every(self, index: int, label: int, look: Look) -> Sequence[str]:
        """As Captions."""
        number, own = self.dataset.place(index)
        return self.of_sources[number].every(own, self._label(number, own), look)

    def prompts(self) -> list[list[str]] | None:
        """As Captions."""
        return None if self.classes is None else self.classes.prompts()

    @property
    def tell_looks(self) -> bool:
        """As Captions."""
        return any(captions.tell_looks for captions in self.of_sources)

    def _label(self, number: int, own: int) -> int:
        """As the source has it."""
        return int(self.dataset.sources[number].labels_of(np.array([own]))[0])

    @property
    def fingerprint(self) -> bytes:
        """As Captions."""
        classes = b"" if self.classes is None else self.classes.fingerprint
        every = [captions.fingerprint for captions in self.of_sources]
        return fingerprint(self.dataset.fingerprint.encode(), *every, classes).encode()


def joined(config: DataConfig, image_shape: tuple[int, int, int], readers: int = 1) -> tuple[Joined, Joined]:
    """The sources of `data.path` to train on, and those of `data.val_path`, or one of every five samples, held out.

    Raises:
        ValueError: for a source that cannot be used, and for classes that do not fit together.
    """
    assert config.path is not None
    train = _opened(config, config.path, "data.path", image_shape, readers)
    if config.val_path is None:
        classes, size = _classes(train, None, config.path), sum(len(source) for source in train)
        if size < FOLDS:
            raise ValueError(f"data.path={config.path} has {size} images, too few to hold out one in {FOLDS}")
        sets = [Joined(train, classes, Part(size, config.fold, is_held_out)) for is_held_out in (False, True)]
    else:
        held_out = _opened(config, config.val_path, "data.val_path", image_shape, readers)
        classes = _classes(train, None, config.path)
        sets = [Joined(train, classes, None), Joined(held_out, _classes(held_out, classes, config.val_path), None)]
    for one in sets:
        one.captions = _captions(one, config)
    return sets[0], sets[1]


def _opened(config: DataConfig, path: str, key: str, image_shape: tuple[int, int, int], readers: int) -> list[Dataset]:
    """All of each source."""
    openers: dict[str, Callable[..., Dataset]] = {
        "image_folder": whole_folder, "image_text": whole_table, "webdataset": whole_shards, "parquet": whole_shards
    }  # fmt: skip
    sources = sources_of(path, config.kind, key)
    keys = [config.of_source(source) for source in sources]
    _refuse_twice(keys, f"{key}={path}")
    found = [openers[of.kind](of, key, image_shape, readers) for of in keys]
    shards = [one for one in found if isinstance(one, WebDataset)]
    for one in shards:
        one.store.share(len(shards))
    for form in dict.fromkeys(one.store.form for one in shards):
        alike = [one.store.catalogue for one in shards if one.store.form == form]
        files = [file for catalogue in alike for file in catalogue.files]
        refuse_named_twice(f"{key}={path}", files, np.concatenate([catalogue.hashes for catalogue in alike]))
    return found


def _refuse_twice(sources: Sequence[DataConfig], given: str) -> None:
    """Raise ValueError for folders and tables that are named twice, or lie in each other. Who reads other columns has
    other samples. What shards are the same is known once they are open."""
    for one, other in combinations(sources, 2):
        first, second = (Path(of.path or "").expanduser().resolve() for of in (one, other))
        lies_in = one.kind == "image_folder" and (first in second.parents or second in first.parents)
        columns = [(of.kind, of.image_column, of.caption_column, of.label_column) for of in (one, other)]
        if columns[0] == columns[1] and (first == second or lies_in):
            raise ValueError(f"{given} names {other.path} in two sources: name each once, and see data.weights")


def _classes(sources: Sequence[Dataset], trained: JoinedClasses | None, path: str) -> JoinedClasses:
    """Of sources, in the numbers of `trained`, if they are held out beside it.

    Raises:
        ValueError: some have names and others numbers, or what is held out has others.
    """
    named = [source.class_names is not None for source in sources if source.num_classes]
    if len(named) < len(sources) or (trained is not None and not trained.count):
        return JoinedClasses(count=0, names=None, numbers=None)
    if any(named) and (not all(named) or (trained is not None and trained.names is None)):
        raise ValueError(
            f"the classes of some sources of {path} have names and those of others are numbers: name these in the "
            "classes.txt beside their shards"
        )
    if not any(named):
        count = max(source.num_classes for source in sources)
        if trained is not None and (trained.names is not None or count > trained.count):
            raise ValueError(f"data.val_path={path} has {count} classes without names, others than data.path")
        return JoinedClasses(count=count if trained is None else trained.count, names=None, numbers=None)
    every = sorted({name for source in sources for name in source.class_names or ()})
    names = tuple(every) if trained is None or trained.names is None else trained.names
    if unknown := sorted(set(every) - set(names)):
        raise ValueError(f"data.val_path={path} has the classes {unknown[:5]}, which data.path does not have")
    at = {name: number for number, name in enumerate(names)}
    numbers = [np.array([at[name] for name in source.class_names or ()], dtype=np.int64) for source in sources]
    return JoinedClasses(count=len(names), names=names, numbers=tuple(numbers))


def _captions(dataset: Joined, config: DataConfig) -> Captions | None:
    """None: a source has neither captions nor classes. Raises ValueError for templates that nobody would use."""
    if any(source.captions is None and not source.num_classes for source in dataset.sources):
        return None
    if config.templates is not None and all(source.captions is not None for source in dataset.sources):
        raise ValueError(
            f"data.templates has no effect with data.path={config.path}, whose samples have captions: leave it out"
        )
    of_sources = [source.captions or captions_of(source, config) for source in dataset.sources]
    classes = None
    if dataset.class_names is not None:
        prompts = class_prompts(config)
        names = class_words(dataset, config.kind)
        classes = TemplateCaptions(names=names, templates=prompts, class_prompts=prompts)
    return JoinedCaptions(dataset=dataset, of_sources=tuple(of_sources), classes=classes)
