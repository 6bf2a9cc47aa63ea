"""Images in folders, PATH/CLASS/.../IMAGE, decoded when they are read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.datasets import Dataset, fingerprint, stratified_split
from data.decode import check_channels, decode, sides
from data.held_out import FOLDS
from data.scaling import Finish
from data.sharing import scan_once
from data.showing import read_file


class FileList(Protocol):
    """Image files and their labels [N]; `classes` names these, none if they have no names."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    def file(self, index: int) -> str: ...
    def describe(self) -> str: ...


class ImageFiles(Dataset):
    """The files of a list, or those at `part`, and their labels.

    A box is cut out of each image and scaled to image_shape with an antialiasing bilinear filter. For evaluation that
    is the largest centred box (or what `showing` says), for training with random crops a random one: crops see the
    file's full resolution.
    """

    crops_when_read = True
    tells_sides = True

    def __init__(
        self, listing: FileList, image_shape: tuple[int, int, int], part: NDArray[np.int64] | None = None
    ) -> None:
        check_channels(image_shape[0])
        self.listing = listing
        self.part = part
        self.labels = listing.labels if part is None else listing.labels[part]
        self.num_classes = len(listing.classes)
        self.class_names = listing.classes or None
        self.image_shape = image_shape

    @property
    def source(self) -> str:
        return self.listing.describe()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Of the files' names, each with its folder's, their labels, and which of them are taken."""
        part = b"" if self.part is None else self.part.tobytes()
        return fingerprint(self.listing.fingerprint.encode(), part)

    def read(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None, finish: Finish | None = None
    ) -> Tensor:
        images = np.empty((len(indices), *self.image_shape), dtype=np.float32)
        for row, index in enumerate(indices.tolist()):
            own, done = None if crop is None else crop[row], None if finish is None else finish.of([row])
            images[row] = read_file(self._file(index), own, self.image_shape, self.showing, finish=done)
        return torch.from_numpy(images)

    def sides(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([sides(self._file(index)) for index in indices.tolist()], dtype=np.int64).reshape(-1, 2)

    def read_sized(self, index: int, crop: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        return decode(self._file(index), crop, shape)

    def _file(self, index: int) -> str:
        return self.listing.file(index if self.part is None else int(self.part[index]))


def whole_folder(config: DataConfig, key: str, image_shape: tuple[int, int, int], readers: int) -> ImageFiles:
    """All images of the folder `config.path`, as a source among others; `key` is the option that gave it."""
    assert config.path is not None
    return ImageFiles(scan_once(config.path, key, readers), image_shape)


def image_folder(
    path: str, val_path: str | None, image_shape: tuple[int, int, int], fold: int, readers: int = 1
) -> tuple[ImageFiles, ImageFiles]:
    """The images of `path` to train on, and those of `val_path` (or fold `fold` of `path`) held out.

    `readers` processes of this host ask for the same: one of them scans the folders.

    Raises:
        ValueError: for missing, unreadable or empty folders, differing classes, and classes too small to be split.
    """
    listing = scan_once(path, "data.path", readers)
    if val_path is not None:
        held_out = scan_once(val_path, "data.val_path", readers)
        if listing.classes != held_out.classes:
            ours, theirs = set(listing.classes), set(held_out.classes)
            raise ValueError(
                f"data.path={path} and data.val_path={val_path} must hold the same classes: only in data.path "
                f"{sorted(ours - theirs)}, only in data.val_path {sorted(theirs - ours)}"
            )
        return ImageFiles(listing, image_shape), ImageFiles(held_out, image_shape)
    for name, count in zip(listing.classes, np.bincount(listing.labels), strict=True):
        if count < FOLDS:
            raise ValueError(
                f"class {name!r} of data.path={path} has {count} images, too few to hold out one in {FOLDS}: "
                f"add images, or give held-out images in data.val_path"
            )
    train, part = stratified_split(listing.labels, fold)
    return ImageFiles(listing, image_shape, train), ImageFiles(listing, image_shape, part)
