"""Two views of each image, and held-out images that are varied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data import Batch, DataConfig, Dataset, EvalStream, TrainStream
from data.augment import draw_augmentation
from data.batch import SECOND_VIEW
from data.keyed import of_local_crop

Datasets = tuple[Dataset, Dataset]
ONE = DataConfig(rotate=15, crop_min_area=0.5, brightness=0.2, noise=0.05)
TWO = replace(ONE, views=2)


def first_batch(dataset: Dataset, config: DataConfig, **options: Any) -> Batch:
    defaults = {"global_batch_size": 12, "micro_batch_size": 12, "data_rank": 0, "data_size": 1, "seed": 0}
    return next(TrainStream(dataset, config=config, **{**defaults, **options}).steps(3))[0]


def parts(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the second views."""
    half = len(batch.labels) // 2
    assert batch.images is not None and batch.texts is not None
    values = (batch.images, batch.labels, batch.sample_ids, batch.weights, batch.texts)
    first, second = zip(*(value.split(half) for value in values), strict=True)
    return Batch(*first), Batch(*second)


def test_the_second_views_follow_the_first_and_are_drawn_anew(digits: Datasets) -> None:
    alone = first_batch(digits[0], ONE)
    first, second = parts(first_batch(digits[0], TWO))
    for name in ("images", "labels", "sample_ids", "weights", "texts"):
        assert torch.equal(getattr(first, name), getattr(alone, name)), name
    assert torch.equal(second.labels, first.labels) and torch.equal(second.weights, first.weights)
    assert torch.equal(second.sample_ids, first.sample_ids + SECOND_VIEW)
    assert first.images is not None and second.images is not None
    assert (first.images != second.images).flatten(1).any(1).all()
    assert not torch.equal(first.texts, second.texts)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_are_the_same_in_every_layout(digits: Datasets, workers: int) -> None:
    whole = parts(first_batch(digits[0], TWO))
    config = replace(TWO, workers=workers)
    part = parts(first_batch(digits[0], config, micro_batch_size=3, data_rank=1, data_size=2))
    for ours, expected in zip(part, whole, strict=True):
        for name in ("images", "labels", "sample_ids", "weights", "texts"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)[6:9]), name


def test_held_out_views_are_the_image_and_one_other(digits: Datasets) -> None:
    _, held_out = digits
    plain, two, varied = (
        list(EvalStream(held_out, config=config, micro_batch_size=200, data_rank=0, data_size=1))
        for config in (ONE, TWO, replace(ONE, vary_held_out=True))
    )
    for alone, both, other in zip(plain, two, varied, strict=True):
        first, second = parts(both)
        real = alone.weights == 1
        for batch in (alone, first, second, other):
            assert batch.images is not None and torch.equal(batch.weights, alone.weights)
            assert torch.equal(batch.labels, alone.labels) and (batch.sample_ids[~real] == -1).all()
            assert (batch.images[~real] == -1).all()  # black
        assert first.images is not None and torch.equal(first.images, alone.images)
        assert torch.equal(second.sample_ids[real], alone.sample_ids[real] + SECOND_VIEW)
        for batch in (second, other):
            assert batch.images is not None and (batch.images != first.images).flatten(1).any(1)[real].all()
        assert not torch.equal(other.images, second.images) and not torch.equal(other.texts, alone.texts)
    pieces = EvalStream(
        held_out, config=replace(ONE, vary_held_out=True), micro_batch_size=50, data_rank=1, data_size=2
    )
    assert torch.equal(next(iter(pieces)).images, varied[0].images[50:100])


def test_local_crops_follow_the_views(digits: Datasets) -> None:
    """Each drawn anew, of a small part, the same in every layout; held-out ones are blank."""
    cropped = replace(TWO, local_crops=2, local_crop_area=(0.1, 0.2), rotate=0.0, brightness=0.0, noise=0.0)
    without = replace(cropped, local_crops=0, local_crop_area=DataConfig.local_crop_area)
    batch, two = first_batch(digits[0], cropped), first_batch(digits[0], without)
    assert batch.images is not None and two.images is not None
    assert torch.equal(batch.images[:24], two.images) and torch.equal(batch.sample_ids[:24], two.sample_ids)
    views = batch.images.split(12)
    assert len(views) == 4 and not torch.equal(views[2], views[3])
    assert torch.equal(batch.sample_ids[36:], batch.sample_ids[:12] + 3 * SECOND_VIEW)
    assert torch.equal(batch.labels, batch.labels[:12].repeat(4)) and batch.weights.sum() == 48
    part = first_batch(digits[0], replace(cropped, workers=1), micro_batch_size=3, data_rank=1, data_size=2)
    assert part.images is not None and torch.equal(part.images, torch.cat([view[6:9] for view in views]))
    areas = draw_augmentation(cropped, 0, 0, 200, of_local_crop(1), cropped.local_crop_area).crop[:, 0]
    assert 0.1 <= areas.min() < 0.11 and 0.19 < areas.max() <= 0.2
    held_out = next(iter(EvalStream(digits[1], config=cropped, micro_batch_size=4, data_rank=0, data_size=1)))
    assert held_out.images is not None and len(held_out.images) == 16 and not held_out.images[8:].any()
    assert cropped.one_view == replace(without, views=1)
    with pytest.raises(ValueError, match=r"local_crop_area is \[0\.1, 0\.2\], but data\.local_crops is 0"):
        replace(TWO, local_crop_area=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"local_crop_area is \(0\.3, 0\.2\): it must be the smallest and the largest"):
        replace(cropped, local_crop_area=(0.3, 0.2))
