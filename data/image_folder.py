"""Images in folders, PATH/CLASS/IMAGE, decoded by Pillow when they are read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import crop_boxes
from data.config import FOLDS
from data.datasets import Dataset, fingerprint, stratified_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_CENTRE = np.array([1.0, 1.0, 0.5, 0.5])  # largest box of the result's shape, in the middle


class ImageFolder(Dataset):
    """Image files and their labels.

    A box is cut out of each image and scaled to image_shape with an antialiasing bilinear filter. For evaluation that
    is the largest centred box (the same as resizing the shorter side, then cropping the centre), for training with
    random crops a random one: crops see the file's full resolution.
    """

    crops_when_read = True

    def __init__(
        self, files: list[Path], labels: NDArray[np.int64], num_classes: int, image_shape: tuple[int, int, int]
    ) -> None:
        if image_shape[0] not in (1, 3):
            raise ValueError(f"image folders are read with 1 channel (grey) or 3 (RGB), not {image_shape[0]}")
        self.files = files
        self.labels = labels
        self.num_classes = num_classes
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Of the files' names, each with its folder's, and their labels."""
        names = "\0".join(f"{file.parent.name}/{file.name}" for file in self.files)
        return fingerprint(names.encode(errors="surrogateescape"), self.labels.tobytes())

    def load(self, index: int) -> tuple[NDArray[np.float32], int]:
        return self._decode(self.files[index], _CENTRE), int(self.labels[index])

    def read(self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None) -> Tensor:
        images = np.empty((len(indices), *self.image_shape), dtype=np.float32)
        for row, index in enumerate(indices):
            images[row] = self._decode(self.files[index], _CENTRE if crop is None else crop[row])
        return torch.from_numpy(images)

    def _decode(self, file: Path, crop: NDArray[np.float64]) -> NDArray[np.float32]:
        from PIL import Image

        channels, height, width = self.image_shape
        mode = "L" if channels == 1 else "RGB"
        try:
            with Image.open(file) as image:
                left, top, box_width, box_height = crop_boxes(crop, image.height, image.width, width / height).tolist()
                # JPEG decodes straight to a half, quarter or eighth of its size, where that is still large enough.
                full_width, full_height = image.size
                image.draft(
                    mode, (math.ceil(full_width * width / box_width), math.ceil(full_height * height / box_height))
                )
                x, y = image.width / full_width, image.height / full_height
                right, bottom = min(left + box_width, full_width), min(top + box_height, full_height)  # rounding
                box = (left * x, top * y, right * x, bottom * y)
                scaled = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR, box=box)
        except Exception as error:  # decoders raise many types: OSError, SyntaxError, struct.error, ...
            raise ValueError(f"{file} cannot be decoded ({error}): replace or remove this file") from error
        pixels = np.asarray(scaled, dtype=np.float32).reshape(height, width, channels)
        return pixels.transpose(2, 0, 1) / np.float32(255)


def image_folder(
    path: str, val_path: str | None, image_shape: tuple[int, int, int], fold: int
) -> tuple[ImageFolder, ImageFolder]:
    """The images of `path` to train on, and those of `val_path` (or fold `fold` of `path`) held out.

    Raises:
        ValueError: for missing or empty folders, differing classes, and classes too small to be split.
    """
    classes = _scan(path, "data.path")
    files, labels = _flatten(classes)
    if val_path is not None:
        val_classes = _scan(val_path, "data.val_path")
        if classes.keys() != val_classes.keys():
            raise ValueError(
                f"data.path={path} and data.val_path={val_path} must hold the same classes: only in data.path "
                f"{sorted(classes.keys() - val_classes.keys())}, only in data.val_path "
                f"{sorted(val_classes.keys() - classes.keys())}"
            )
        val_files, val_labels = _flatten(val_classes)
        return (
            ImageFolder(files, labels, len(classes), image_shape),
            ImageFolder(val_files, val_labels, len(classes), image_shape),
        )
    for name, members in classes.items():
        if len(members) < FOLDS:
            raise ValueError(
                f"class {name!r} of data.path={path} has {len(members)} images, too few to hold out one in {FOLDS}: "
                f"add images, or give held-out images in data.val_path"
            )
    train, held_out = (
        ImageFolder([files[i] for i in part], labels[part], len(classes), image_shape)
        for part in stratified_split(labels, fold)
    )
    return train, held_out


def _scan(path: str, key: str) -> dict[str, list[Path]]:
    """The image files of every class, both sorted by name: the same on every machine."""
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{key}={path} is not a folder: give one with a sub-folder of images per class")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in SUFFIXES) for f in folders}
    empty = [name for name, files in classes.items() if not files]
    if not classes or empty:
        missing = f"no images ({' '.join(SUFFIXES)}) in {empty}" if classes else "no sub-folders"
        raise ValueError(f"{key}={path} has {missing}: images are looked for as {key}/CLASS/IMAGE")
    return classes


def _flatten(classes: dict[str, list[Path]]) -> tuple[list[Path], NDArray[np.int64]]:
    files = [file for members in classes.values() for file in members]
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    return files, labels
