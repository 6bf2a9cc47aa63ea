"""A training set with few images of each class, or few labels.

Which ones these are is drawn by (seed, number of the image) alone: the first so many of each class in a permutation of
the whole set. So the images that keep their labels under one key are those that are kept under the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.datasets import Dataset, fingerprint
from data.keyed import Purpose, keyed_permutation
from data.mixing import has_empty_source
from data.scaling import Finish

UNKNOWN = -1
"""The label of an image whose label is not known."""


class Few(Dataset):
    """Some images of a set, some of them with labels; nothing can be said of them but their classes.

    Args:
        whole: the set. images: int64 [N], their numbers in it, ascending. labels: int64 [N], or UNKNOWN.
    """

    def __init__(self, whole: Dataset, images: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.whole, self.labels, self._images = whole, labels, images
        self.num_classes, self.image_shape, self.class_names = whole.num_classes, whole.image_shape, whole.class_names
        self.crops_when_read = whole.crops_when_read
        self.tells_sides, self.resolution = whole.tells_sides, whole.resolution
        known = int((labels != UNKNOWN).sum())
        self.labelled = known if known < len(labels) else None
        if whole.shard_ends is not None:
            self.shard_ends = np.unique(self._before(whole.shard_ends))  # none that is empty
            self.shard_ends = self.shard_ends[self.shard_ends > 0]
        if whole.source_ends is not None:
            self.source_ends = self._before(whole.source_ends)

    @property
    def source(self) -> str | None:
        return self.whole.source

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.whole.fingerprint.encode(), self._images.tobytes(), self.labels.tobytes())

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        return self.whole.read(self._images[indices], crop, finish)

    def sides(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.whole.sides(self._images[indices])

    def read_sized(self, index: int, crop: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        return self.whole.read_sized(int(self._images[index]), crop, shape)

    def _before(self, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of these images are among the first so many of the whole set: [K] -> [K]."""
        return np.searchsorted(self._images, ends)


def few_of_each_class(dataset: Dataset, config: DataConfig, seed: int) -> Dataset:
    """What data.images_per_class and data.labels_per_class leave of a training set; itself, where neither is given.

    Raises:
        ValueError: a key leaves all as it is, or a source that is to have a share without an image.
    """
    given = {name: getattr(config, name) for name in ("images_per_class", "labels_per_class")}
    if not any(given.values()):
        return dataset
    labels = dataset.labels
    places, most = _places(labels, seed)
    for name, count in given.items():
        if count is not None and count >= most:
            raise ValueError(
                f"data.{name} is {count}, but no class has more than {most} training images: use fewer, or leave it out"
            )
    images = np.flatnonzero(places < (config.images_per_class or most))
    known = places[images] < (config.labels_per_class or most)
    few = Few(dataset, images, np.where(known, labels[images], UNKNOWN))
    if config.weights and has_empty_source(few):
        raise ValueError(
            f"data.images_per_class is {config.images_per_class}, which leaves a source of data.path without an image "
            "to train on: use more, or leave the source and its share of data.weights out"
        )
    return few


def _places(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], int]:
    """(the place of each image among those of its class, in an order that is drawn: [N]; images of the largest)."""
    order = keyed_permutation(seed, Purpose.FEW, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    places = np.empty_like(labels)
    places[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, int(counts.max())
