"""Few images, or few labels, of each class: which, the same everywhere, and what becomes of the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data import DataConfig, Dataset, TrainStream, build_datasets, describe_datasets
from data.datasets import SyntheticDataset
from data.few import UNKNOWN, Few, few_of_each_class


def training(seed: int = 0, **keys: int) -> Dataset:
    return build_datasets(DataConfig(**keys), image_size=8, channels=1, num_classes=10, seed=seed)[0]  # type: ignore[arg-type]


def test_few_images_are_those_of_which_few_labels_are_known(digits: tuple[Dataset, Dataset]) -> None:
    whole, held_out = digits
    images, labels = training(images_per_class=10), training(labels_per_class=10)
    known = np.flatnonzero(labels.labels != UNKNOWN)
    assert np.bincount(images.labels).tolist() == [10] * 10 and len(labels) == len(whole)
    np.testing.assert_array_equal(whole.labels[known], labels.labels_of(known))
    np.testing.assert_array_equal(images.labels, labels.labels[known])
    assert torch.equal(images.read(np.arange(100)), whole.read(known))
    assert torch.equal(labels.read(np.arange(50)), whole.read(np.arange(50)))
    pixels, label = images.load(3)
    assert label == whole.labels[known[3]] and np.array_equal(pixels, whole.load(int(known[3]))[0])
    assert len({of.fingerprint for of in (whole, images, labels, training(1, labels_per_class=10))}) == 4
    assert training(labels_per_class=10).fingerprint == labels.fingerprint
    line, *_ = describe_datasets("digits", labels, held_out, 10)
    assert line == "data: digits, 1437 training (100 of them with labels) and 360 held-out images"
    few = training(images_per_class=20, labels_per_class=10)
    assert (len(few), few.labelled, images.labelled) == (200, 100, None)
    assert {tuple(x) for x in images.read(np.arange(100)).flatten(1).tolist()} <= {
        tuple(x) for x in few.read(np.flatnonzero(few.labels != UNKNOWN)).flatten(1).tolist()
    }


def test_data_ranks_are_told_the_same_labels() -> None:
    dataset, config = training(labels_per_class=10), DataConfig(labels_per_class=10)

    def labels(rank: int, ranks: int, micro: int) -> list[int]:
        stream = TrainStream(
            dataset, config=config, global_batch_size=24, micro_batch_size=micro, data_rank=rank, data_size=ranks,
            seed=0, with_images=False,
        )  # fmt: skip
        return [label for batch in next(stream.steps(3)) for label in batch.labels.tolist()]

    assert labels(0, 1, 24) == labels(0, 2, 4) + labels(1, 2, 4)
    assert UNKNOWN in labels(0, 1, 24)


def test_shards_and_sources_that_lose_images() -> None:
    whole = SyntheticDataset(0, 12, (1, 2, 2), 2, seed=0)
    whole.shard_ends, whole.source_ends = np.array([2, 4, 6, 12]), np.array([4, 12])
    few = Few(whole, np.array([0, 6, 7]), whole.labels[[0, 6, 7]])
    assert few.shard_ends is not None and few.source_ends is not None
    assert few.shard_ends.tolist() == [1, 3] and few.source_ends.tolist() == [1, 3]
    whole.labels[:] = np.arange(12) >= 11
    shares = DataConfig(kind="webdataset", path="a::b", weights=(1.0, 2.0), images_per_class=1)
    with pytest.raises(ValueError, match=r"images_per_class is 1, which leaves a source of data\.path without an im"):
        for seed in range(20):
            few_of_each_class(whole, shares, seed)


def test_as_many_as_there_are_is_refused() -> None:
    for key in ("images_per_class", "labels_per_class"):
        with pytest.raises(ValueError, match=rf"data\.{key} is 147, but no class has more than 14\d training images"):
            training(**{key: 147})
