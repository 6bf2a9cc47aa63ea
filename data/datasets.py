"""What every data set offers, and the two that live in memory: handwritten digits and random numbers.

Shapes: N images in the set, B in a micro-batch, C channels, H x W pixels.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.captions import Captions
from data.held_out import FOLDS
from data.keyed import Purpose, keyed_permutation, keyed_uniforms
from data.resolution import Resolution, cut
from data.scaling import Finish

if TYPE_CHECKING:
    from data.showing import Showing
    from data.texts import Texts


def fingerprint(*parts: bytes) -> str:
    """A short hash of some bytes."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


class Dataset(Protocol):
    """A set of labelled images, all of one shape. Pixels are float32 in 0..1, before normalisation."""

    labels: NDArray[np.int64]  # [N]
    num_classes: int
    image_shape: tuple[int, int, int]  # C, H, W
    crops_when_read: bool
    """Whether `read` cuts the crops, out of sources larger than image_shape; else they are left to augmentation."""
    class_names: Sequence[str] | None = None
    """The name of each label, where labels have names."""
    labelled: int | None = None
    """How many images have a label, where not all have; those of the others are data.few.UNKNOWN."""
    captions: Captions | None = None
    """What can be said of the images."""
    texts: Texts | None = None
    """How that becomes tokens; None: nobody reads texts."""
    resolution: Resolution | None = None
    """How images of several sizes become patches; None: all have image_shape."""
    tells_sides: bool = False
    """Whether `sides` and `read_sized` are of the images as they are stored."""

    showing: Showing | None = None
    """How image files are shown in evaluation; None: the largest centred box."""

    shard_ends: NDArray[np.int64] | None = None
    """[K] How many images there are up to and with each shard, where the set lies in shards."""
    source_ends: NDArray[np.int64] | None = None
    """The same of each source, where there are several."""

    @property
    def source(self) -> str | None:
        """What was found where, and what of it was left out; None where there is nothing to tell."""
        return None

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of what sample i is, the same wherever the set is the same: for ranks to see that theirs is."""
        return fingerprint(repr(self.image_shape).encode(), self.labels.tobytes())

    def show(self, showing: Showing | None) -> None:
        """Show image files so in evaluation."""
        self.showing = showing

    def labels_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels of some images: [B]. Large sets have them at hand one by one, and `labels` is made when asked."""
        return self.labels[indices]

    def load(self, index: int) -> tuple[NDArray[np.float32], int]:
        """One image [C, H, W], as evaluation sees it, and its label."""
        one = np.array([index])
        return self.read(one)[0].numpy(), int(self.labels_of(one)[0])

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        """The images [B, C, H, W] at `indices`; `crop` is [B, 4] (see augment.crop_boxes), None: as for evaluation.
        They are in 0..1, or finished, which sets are asked for that crop when they read."""
        ...

    def sides(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows and columns of pixels of some images as they are stored [B, 2], without decoding them; here those of a
        set that has one size."""
        return np.tile(np.array(self.image_shape[1:]), (len(indices), 1))

    def read_sized(self, index: int, crop: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """The box that `crop` [4] (see augment.crop_boxes) cuts out of an image, scaled to `shape`: [C, H, W]."""
        return cut(self.load(index)[0], crop, shape)


class ArrayDataset(Dataset):
    """Images that are held in memory as one tensor [N, C, H, W]."""

    crops_when_read = False
    tells_sides = True

    def __init__(self, images: Tensor, labels: NDArray[np.int64], num_classes: int) -> None:
        self.images = images
        self.labels = labels
        self.num_classes = num_classes
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        assert crop is None and finish is None, "random crops of images in memory are part of the one resampling"
        return self.images[torch.from_numpy(indices)]


class SyntheticDataset(ArrayDataset):
    """Random images and labels. Image i of the set depends on (seed, first + i) alone."""

    def __init__(self, first: int, size: int, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> None:
        self._first = first
        self._seed = seed
        self.image_shape = image_shape
        self.num_classes = num_classes
        uniforms = keyed_uniforms(seed, Purpose.SYNTHETIC_LABELS, first, size, width=1)[:, 0]
        self.labels = (uniforms.astype(np.float64) * num_classes).astype(np.int64)

    @cached_property
    def images(self) -> Tensor:  # type: ignore[override]
        """Made at first use: most pipeline stages never look at an image."""
        pixels = keyed_uniforms(
            self._seed, Purpose.SYNTHETIC_IMAGES, self._first, len(self), width=math.prod(self.image_shape)
        )
        return torch.from_numpy(pixels.reshape(-1, *self.image_shape))


def synthetic(
    size: int, image_shape: tuple[int, int, int], num_classes: int, seed: int
) -> tuple[SyntheticDataset, SyntheticDataset]:
    """`size` random images for training, and a quarter as many, other ones, held out.

    Raises:
        ValueError: for more than the host's memory holds.
    """
    needed, memory = 5 * size * math.prod(image_shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"data.size is {size}: so many images take {needed / 2**30:.3g} GiB, and there are "
            f"{memory / 2**30:.3g} GiB of memory: set it to {max(1, memory // (needed // size) // 2)} or less"
        )
    train = SyntheticDataset(0, size, image_shape, num_classes, seed)
    return train, SyntheticDataset(size, math.ceil(size / 4), image_shape, num_classes, seed)


def digits(image_shape: tuple[int, int, int], fold: int) -> tuple[ArrayDataset, ArrayDataset]:
    """scikit-learn's 1797 handwritten digits (8x8, grey), split into (training, held out fold).

    For another image size they are resized bilinearly; for several channels the grey values are repeated.
    """
    folder = installed_folder("sklearn", "datasets/data", kind="digits", package="scikit-learn")
    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",", dtype=np.int64)  # 64 pixels, then the label
    pixels, labels = table[:, :-1], table[:, -1].copy()
    channels, height, width = image_shape
    images = torch.from_numpy(pixels.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    if (height, width) != (8, 8):
        images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    images = images.repeat(1, channels, 1, 1)
    train, held_out = (ArrayDataset(images[part], labels[part], 10) for part in stratified_split(labels, fold))
    train.class_names = held_out.class_names = tuple(map(str, range(10)))
    return train, held_out


def installed_folder(module: str, folder: str, *, kind: str, package: str) -> Path:
    """A folder of an installed package, found without importing it: that takes seconds, on each of many ranks."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"data.kind {kind} needs {package}, which is not installed: pip install {package}")
    return Path(found.submodule_search_locations[0]) / folder


def stratified_split(labels: NDArray[np.int64], fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and to hold out: fold `fold` of a split that is the same in every run, whatever its seed.

    The images of each class, in an order drawn once, are dealt to the folds in turn; each class goes on where the one
    before it stopped, so that folds are of one size give or take one image.
    """
    order = keyed_permutation(0, Purpose.SPLIT, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[by_class[fold::FOLDS]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
