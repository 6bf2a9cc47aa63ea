"""Mixup and CutMix: the same images and labels in every layout, and timm's where it is given our random numbers."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from data import Batch, DataConfig, Dataset, TrainStream
from data.blending import blend, draw_blend, partners
from data.keyed import Purpose, keyed_uniforms
from tools.convert.libraries import library

BOTH = DataConfig(
    rotate=10, erase=0.3, rand_augment="rand-m7-n1", mixup=0.8, cutmix=1.0, mix_probability=0.9, cutmix_switch=0.4
)
Datasets = tuple[Dataset, Dataset]


def step_of(dataset: Dataset, config: DataConfig, step: int, micro: int, data_size: int = 1, offset: int = 0) -> Batch:
    """A global batch of 24, put together."""
    parts: list[Batch] = []
    for rank in range(data_size):
        stream = TrainStream(
            dataset, config=config, global_batch_size=24, micro_batch_size=micro, data_rank=rank, data_size=data_size,
            seed=3, with_texts=False, offset=offset,
        )  # fmt: skip
        parts += next(stream.steps(step))
    joined = {
        name: torch.cat([vars(part)[name] for part in parts]) for name, x in vars(parts[0]).items() if x is not None
    }
    return Batch(**joined)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_global_batch_is_the_same_in_every_layout(digits: Datasets, repeats: int) -> None:
    config = replace(BOTH, repeats=repeats)
    for step, offset in ((0, 0), (59, 0), (4, 5)):  # two epochs of 1437 images in a batch; pairs over its end
        expected = step_of(digits[0], config, step, micro=24, offset=offset)
        assert expected.own_shares is not None and 0 < (expected.own_shares < 1).sum() < 24
        for data_size, micro in ((1, 1), (1, 3), (2, 4), (8, 3)):
            found = step_of(digits[0], config, step, micro, data_size, offset)
            for name, x in vars(expected).items():
                assert x is None or torch.equal(vars(found)[name], x), (name, data_size, micro)


def test_partners_are_neighbours_that_are_each_others() -> None:
    draws = np.arange(24)
    assert partners(draws, 1).tolist() == list(itertools.chain.from_iterable((n + 1, n) for n in range(0, 24, 2)))
    for repeats in (1, 2, 3):
        others = partners(draws, repeats)
        assert partners(others, repeats).tolist() == draws.tolist()
        assert (others // repeats != draws // repeats).all()  # of another image


@pytest.mark.parametrize("keys", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 2.0, "cutmix": 1.0}], ids=str)
def test_mixtures_are_timms(digits: Datasets, keys: dict[str, float]) -> None:
    library("timm")
    module = importlib.import_module("timm.data.mixup")
    batch, plain = (step_of(digits[0], DataConfig(**of), 0, micro=24) for of in (keys, {}))
    assert batch.images is not None and plain.images is not None and batch.own_shares is not None
    assert batch.other_labels is not None
    config, order = DataConfig(**keys), partners(np.arange(24), 1)
    assert torch.equal(batch.other_labels, plain.labels[torch.from_numpy(order)])
    how, kinds = draw_blend(config, 3, 0, 24, 8, 8), set()
    drawn = keyed_uniforms(3, Purpose.BLEND, 0, 24, width=5)[:, 2:].astype(np.float64)  # of beta(1, 1) itself; a place
    for row, (image, other) in enumerate(zip(plain.images, plain.images[torch.from_numpy(order)], strict=True)):
        share = float(how.shares[row])
        top, bottom, left, right = how.boxes[row].tolist()
        if how.boxes[row].any():
            raw, *place = drawn[row]
            with patch.object(np.random, "randint", side_effect=[int(8 * part) for part in place]):
                (yl, yh, xl, xh), corrected = module.cutmix_bbox_and_lam((1, 8, 8), raw)
            assert (yl, yh, xl, xh) == (top, bottom, left, right) and corrected == pytest.approx(share)
            expected = image.clone()
            expected[:, yl:yh, xl:xh] = other[:, yl:yh, xl:xh]
        else:
            expected = image * share + other * (1 - share)
        kinds.add(bool(how.boxes[row].any()))
        torch.testing.assert_close(batch.images[row], expected)
        assert batch.own_shares[row].item() == pytest.approx(share)
    assert kinds == {name == "cutmix" for name in keys}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    drawn = draw_blend(DataConfig(mixup=alpha), 0, 0, 20000, 8, 8).shares
    assert not drawn[drawn == 1].size > 1000
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    cut = draw_blend(DataConfig(cutmix=alpha, mixup=alpha, cutmix_switch=0.3, mix_probability=0.5), 0, 0, 20000, 64, 64)
    assert (cut.boxes.any(1)).mean() == pytest.approx(0.15, abs=0.02)
    assert (cut.shares == 1).mean() == pytest.approx(0.5, abs=0.03)


def test_an_image_alone_stays_as_it_is() -> None:
    images, rows = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), np.arange(4)
    how = draw_blend(DataConfig(mixup=1.0, cutmix=1.0, mix_probability=1e-9), 0, 0, 4, 8, 8)
    assert torch.equal(blend(images, rows, rows[::-1], how), images)
