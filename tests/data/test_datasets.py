from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from data import DataConfig, Dataset, build_datasets


def test_digits_are_split_by_class_and_never_overlap() -> None:
    held_out = []
    for fold in range(5):
        train, held = build_datasets(DataConfig(fold=fold), image_size=8, channels=1, num_classes=10, seed=fold)
        assert len(train) + len(held) == 1797 and len(held) in (359, 360)
        whole = np.bincount(train.labels) + np.bincount(held.labels)
        assert (np.abs(np.bincount(held.labels) - whole / 5) < 1).all()
        held_out.append(held.read(np.arange(len(held))).flatten(1))
    assert len(torch.unique(torch.cat(held_out), dim=0)) == 1797  # the digits are all different


def test_the_split_is_the_same_for_every_seed(digits: tuple[Dataset, Dataset]) -> None:
    again, _ = build_datasets(DataConfig(), image_size=8, channels=1, num_classes=10, seed=123)
    np.testing.assert_array_equal(again.labels, digits[0].labels)


def test_digits_at_another_size_and_in_colour(digits: tuple[Dataset, Dataset]) -> None:
    train, _ = build_datasets(DataConfig(), image_size=(16, 12), channels=3, num_classes=None, seed=0)
    assert train.image_shape == (3, 16, 12) and train.num_classes == 10
    pixels, label = train.load(5)
    assert pixels.shape == (3, 16, 12) and pixels.dtype == np.float32 and pixels.min() >= 0 and pixels.max() <= 1
    assert label == digits[0].labels[5]
    assert abs(pixels.mean() - digits[0].load(5)[0].mean()) < 0.05


def test_synthetic_images_depend_on_seed_and_index_alone() -> None:
    config = DataConfig(kind="synthetic", size=20)
    small, small_held = build_datasets(config, image_size=5, channels=3, num_classes=7, seed=1)
    large, _ = build_datasets(DataConfig(kind="synthetic", size=25), image_size=5, channels=3, num_classes=7, seed=1)
    other, _ = build_datasets(config, image_size=5, channels=3, num_classes=7, seed=2)
    assert (len(small), len(small_held), small.num_classes) == (20, 5, 7)
    assert set(large.labels) <= set(range(7))
    every = large.read(np.arange(25))
    assert torch.equal(every, torch.cat([small.read(np.arange(20)), small_held.read(np.arange(5))]))
    np.testing.assert_array_equal(large.labels, np.concatenate([small.labels, small_held.labels]))
    assert not torch.equal(other.read(np.arange(20)), every[:20])
    assert len(torch.unique(every.flatten(1), dim=0)) == 25 and every.min() >= 0 and every.max() < 1


def test_too_few_classes_in_the_model() -> None:
    with pytest.raises(ValueError, match=r"model\.num_classes is 9, but data\.kind=digits has 10 classes"):
        build_datasets(DataConfig(), image_size=8, channels=1, num_classes=9, seed=0)


def test_digits_are_scikit_learns(digits: tuple[Dataset, Dataset]) -> None:
    pixels, labels = load_digits(return_X_y=True)
    images = (part.load(index) for part in digits for index in range(len(part)))
    ours = {(bytes((image * 16).astype(np.uint8)), label) for image, label in images}
    assert ours == {(bytes(image.astype(np.uint8)), int(label)) for image, label in zip(pixels, labels, strict=True)}
