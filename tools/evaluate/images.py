"""The images that a task is about, and whether it can be about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Dataset, build_datasets
from data.datasets import stratified_split
from data.held_out import FOLDS
from engine.config import Config
from engine.config.objectives import text_shape
from engine.errors import ConfigError
from engine.evaluation.rows import Indices
from parallel.process_group import World
from tools.evaluate.options import OF_FEATURES

_SHOWN = 5


@dataclass(frozen=True)
class Images:
    """Training images, which a task may learn from, and those that it is asked about."""

    train: Dataset
    test: Dataset

    @property
    def classes(self) -> int:
        """How many labels there may be."""
        return max(self.train.num_classes, self.test.num_classes)

    @property
    def train_labels(self) -> Tensor:
        """int64 [N]."""
        return torch.from_numpy(self.train.labels.copy())  # which may be a file that is only to be read

    @property
    def test_labels(self) -> Tensor:
        """int64 [N]."""
        return torch.from_numpy(self.test.labels.copy())

    def held_out(self) -> Indices:
        """One in five training images of each class, for choosing by; the same in every run and layout."""
        return stratified_split(self.train.labels, 0)[1]

    def names_of(self, labels: Sequence[int]) -> str:
        """For messages."""
        names = self.train.class_names
        shown = [str(label) if names is None else f"{label} ({names[label]})" for label in labels[:_SHOWN]]
        return ", ".join(shown) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def images_of(config: Config, world: World, classes: int | None, *, texts: bool = False) -> Images:
    """Of a resolved configuration. Before ranks talk.

    Args:
        classes: that the model can tell apart, where that matters. texts: whether there are to be texts of them.

    Raises:
        ConfigError: there are none, or more classes than that.
    """
    sizes = config.model.sizes
    try:
        return Images(
            *build_datasets(
                config.data,
                image_size=sizes.image,
                channels=sizes.channels,
                num_classes=classes,
                seed=config.train.seed,
                readers=world.local_size,
                text=text_shape(config) if texts else None,
                patch_size=sizes.patch,
            )
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_images(images: Images, task: str, config: Config) -> None:
    """Raise ConfigError where a task cannot be done with these images."""
    kind = config.data.kind
    for what, dataset in (("training", images.train), ("held-out", images.test)):
        if task != "retrieval" and (images.classes < 1 or (len(dataset) and int(dataset.labels.min()) < 0)):
            raise ConfigError(f"the {what} images of data.kind {kind} have no labels, which --task {task} needs")
        if not len(dataset):
            raise ConfigError(f"data.kind {kind} has no {what} images, which --task {task} needs")
    if task not in OF_FEATURES:
        return
    if task == "clustering" and len(images.train) < images.classes:
        raise ConfigError(
            f"there are {len(images.train)} training images of {images.classes} classes, too few for as many clusters, "
            "which --task clustering makes of them: give at least one for each"
        )
    known = np.bincount(images.train.labels, minlength=images.classes)
    asked = np.bincount(images.test.labels, minlength=images.classes)
    if missing := np.flatnonzero((known == 0) & (asked > 0)).tolist():
        raise ConfigError(
            f"there are held-out images of class {images.names_of(missing)}, and no training image, which --task "
            f"{task} would learn it from: give other data"
        )
    if task == "fewshot" and (missing := np.flatnonzero(known == 0).tolist()):
        raise ConfigError(
            f"there is no training image of class {images.names_of(missing)}, and --task fewshot takes some of each: "
            "give other data"
        )
    if task == "probe" and len(images.train) < 2 * FOLDS:
        raise ConfigError(
            f"there are {len(images.train)} training images, and --task probe holds out one in {FOLDS} of them to "
            f"choose by: give at least {2 * FOLDS}"
        )
