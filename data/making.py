"""A micro-batch's images and texts, made of a data set by its configuration; what is drawn at random goes by a key.

Shapes: B samples, V views of each (1, 2, or 2 and local crops), C channels, H x W pixels, S tokens of a text. Rows are
view by view.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.augment import Augmentation, augment, draw_augmentation, only_mirrors
from data.captions import CHOICES, Look
from data.config import DataConfig
from data.datasets import Dataset
from data.erasing import erase
from data.keyed import Purpose, Variant, keyed_uniforms, of_local_crop
from data.normalise import Normalise
from data.packed import HELD_OUT_SEED, PackedMaker
from data.reading import Content

_TRAINING = (Variant.TRAINING, Variant.TRAINING_OTHER_VIEW)


class Maker:
    """Makes what is needed of micro-batches; of images of several sizes their patches and maps (data.packed).

    Attributes:
        needs_any: whether anything is. makes_texts: whether they are; there are texts if the set has a tokenizer.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, with_images: bool, with_texts: bool) -> None:
        self._dataset, self._config = dataset, config
        self._with_images = with_images
        self.makes_texts = with_texts and dataset.texts is not None
        self._packed = None if dataset.resolution is None else PackedMaker(dataset, config, with_images=with_images)
        self.needs_any = with_images or self.makes_texts or self._packed is not None
        self._normalise = Normalise(config, channels=dataset.image_shape[0])

    def training(self, indices: NDArray[np.int64], seed: int, first_draw: int) -> Content:
        """Of images at `indices`, which are drawn one after the other from `first_draw` on."""
        if self._packed is not None:
            return self._packed.training(indices, seed, first_draw)
        images, said = [], []
        for variant in _TRAINING[: self._config.views]:
            augmentation = draw_augmentation(self._config, seed, first_draw, len(indices), variant)
            images.append(self._images(indices, augmentation))
            if self.makes_texts:
                said += self._said(
                    indices, augmentation.looks(), *self._choices(seed, first_draw, len(indices), variant)
                )
        for number in range(self._config.local_crops):
            drawn = seed, first_draw, len(indices), of_local_crop(number)
            augmentation = draw_augmentation(self._config, *drawn, self._config.local_crop_area)
            images.append(self._images(indices, augmentation, crops=True))
        return self._content(images, said)

    def held_out(self, indices: NDArray[np.int64], missing: int, are_there: NDArray[np.bool_] | None = None) -> Content:
        """Of the images at `indices`, which follow each other, and `missing` black ones, of which nothing is said; the
        same in place of those that are not there (None: all are).

        The first view is the image itself, unless held-out images are to be varied; local crops, at which nobody looks
        then, are blank.
        """
        if self._packed is not None:
            return self._packed.held_out(indices, missing, are_there)
        are_there = np.ones(len(indices), dtype=np.bool_) if are_there is None else are_there
        images, said = [], []
        for view in range(self._config.views):
            augmentation, looks = None, [Look()] * len(indices)
            if (view or self._config.vary_held_out) and len(indices):
                variant = Variant.HELD_OUT_OTHER_VIEW if view else Variant.HELD_OUT
                augmentation = draw_augmentation(self._config, HELD_OUT_SEED, int(indices[0]), len(indices), variant)
                looks = augmentation.looks()
            images.append(self._images(indices, augmentation, missing, are_there))
            if self.makes_texts:
                own = list(itertools.compress(looks, are_there))
                texts = iter(self._said(indices[are_there], own, None))
                said += [next(texts) if is_there else "" for is_there in are_there] + [""] * missing
        images += [None if images[0] is None else torch.zeros_like(images[0])] * self._config.local_crops
        return self._content(images, said)

    def _images(
        self,
        indices: NDArray[np.int64],
        augmentation: Augmentation | None,
        missing: int = 0,
        are_there: NDArray[np.bool_] | None = None,
        *,
        crops: bool = False,
    ) -> Tensor | None:
        """[B, C, H, W], normalised. crops: whether they are cropped, whatever the configuration says."""
        if not self._with_images:
            return None
        dataset, config = self._dataset, self._config
        crops |= config.crops
        crop = augmentation.crop if augmentation is not None and crops and dataset.crops_when_read else None
        all_are_there = not missing and (are_there is None or bool(are_there.all()))
        # Where nothing comes between, mirroring and normalising take no passes over memory of their own.
        if augmentation is not None and crop is not None and all_are_there and only_mirrors(config):
            images = dataset.read(indices, crop, self._normalise.when_read(augmentation.mirror))
        else:
            images = self._pixels(indices, crop, are_there)
            if augmentation is not None:
                images = augment(images, augmentation, config, crop=crops and crop is None)
            images = self._normalise(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images)
        if augmentation is not None and config.erase:
            erase(images[: len(indices)], config.erase, config.erase_fill, augmentation.photometry.key)
        return images

    def _pixels(
        self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None, are_there: NDArray[np.bool_] | None
    ) -> Tensor:
        """[B, C, H, W] in 0..1, black where they are not there."""
        dataset = self._dataset
        if are_there is None or are_there.all():
            return dataset.read(indices, crop)
        images = torch.zeros(len(indices), *dataset.image_shape)
        images[torch.from_numpy(are_there)] = dataset.read(
            indices[are_there], None if crop is None else crop[are_there]
        )
        return images

    def _choices(
        self, seed: int, first_draw: int, count: int, variant: Variant
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(what captions are drawn by, [B, CHOICES]; how many times the same image came right before, [B]). Which of
        written captions is the first of such a row is drawn once for it."""
        repeats = self._config.repeats
        turns = np.arange(first_draw, first_draw + count) % repeats
        before = int(turns[0])
        choices = keyed_uniforms(seed, Purpose.CAPTION, first_draw - before, before + count, CHOICES, variant)
        choices[:, 1] = choices[np.arange(len(choices)) // repeats * repeats, 1]
        return choices[before:], turns

    def _said(
        self,
        indices: NDArray[np.int64],
        looks: Sequence[Look],
        choices: NDArray[np.float32] | None,
        turns: NDArray[np.int64] | None = None,
    ) -> list[str]:
        """A caption of each image, drawn as `_choices` says; None: its first, or the one that says most."""
        captions, labels = self._dataset.captions, self._dataset.labels_of(indices).tolist()
        assert captions is not None
        rows = list(zip(indices.tolist(), labels, looks, strict=True))
        if choices is None or turns is None:
            return [captions.every(*row)[0] for row in rows]
        drawn = zip(rows, choices, turns.tolist(), strict=True)
        return [captions.one(*row, choice, turn) for row, choice, turn in drawn]

    def _content(self, images: Sequence[Tensor | None], said: Sequence[str]) -> Content:
        made = [view for view in images if view is not None]
        pixels = None if not made else made[0] if len(made) == 1 else torch.cat(made)
        texts = self._dataset.texts
        if not self.makes_texts or texts is None:
            return Content(pixels)
        return Content(pixels, *texts.tokenizer.encode_counted(said, texts.length))
