from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataConfig, Dataset, TrainStream, build_datasets, textures
from data.textures import NUM_CLASSES, Region, TextureCrops, standardise


def build(
    size: int | tuple[int, int], *, channels: int = 1, crops: int = 3, seed: int = 0
) -> tuple[TextureCrops, TextureCrops]:
    config = DataConfig(kind="textures", crops_per_class=crops)
    train, held_out = build_datasets(config, image_size=size, channels=channels, num_classes=None, seed=seed)
    assert isinstance(train, TextureCrops) and isinstance(held_out, TextureCrops)
    return train, held_out


def covered(dataset: TextureCrops, label: int) -> list[tuple[float, float, float, float]]:
    """What each crop of a class covers of the photograph: left, top, right, bottom, in its pixels."""
    region = dataset.regions[label]
    height, width = (side / region.zoom for side in dataset.image_shape[1:])
    corners = ((region.box[0] + x, region.box[1] + y) for y, x in dataset.places[dataset.labels == label].tolist())
    return [(x, y, x + width, y + height) for x, y in corners]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_one_shape_mean_and_contrast(channels: int) -> None:
    for part, per_class in zip(build((48, 64), channels=channels), (3, 16), strict=True):
        assert part.image_shape == (channels, 48, 64) and part.num_classes == NUM_CLASSES
        np.testing.assert_array_equal(np.bincount(part.labels), [per_class] * NUM_CLASSES)
        images = part.read(np.arange(len(part)))
        assert images.shape == (len(part), channels, 48, 64) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert (images.mean((2, 3)) - 0.5).abs().max() < 0.1  # what lies beyond three deviations is cut off
        assert images.std((2, 3)).max() < 0.17 and images.std((2, 3)).median() > 0.15
        pixels, label = part.load(7)
        np.testing.assert_array_equal(pixels, images[7].numpy())
        assert label == part.labels[7] and pixels.dtype == np.float32


@pytest.mark.parametrize("size", [16, 128, (100, 300), 384])
def test_no_pixel_is_both_trained_on_and_held_out(size: int | tuple[int, int]) -> None:
    train, held_out = build(size, crops=50)
    for label in range(NUM_CLASSES):
        ours, theirs = train.regions[label], held_out.regions[label]
        assert ours.file == theirs.file and ours.zoom == theirs.zoom and ours.box[2] == theirs.box[0]
        left, top, right, bottom = ours.box
        for box in covered(train, label):
            assert left <= box[0] and top <= box[1] and box[2] <= right + 1e-6 and box[3] <= bottom + 1e-6
        left, top, right, bottom = theirs.box
        for box in covered(held_out, label):
            assert left <= box[0] and top <= box[1] and box[2] <= right + 1e-6 and box[3] <= bottom + 1e-6


def test_enlarging_does_not_reach_over_the_edge(tmp_path: Path) -> None:
    """A photograph that is black on the left and white on the right: neither side sees the other."""
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:, 4:] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    regions = [Region(file=tmp_path / "x.png", box=(x, 0, x + 4, 8), zoom=3.0) for x in (0, 4)]
    crops = TextureCrops(regions, np.array([[0, 0], [4, 0]]), (1, 12, 12))
    assert (crops.read(np.arange(2)) == 0.5).all()  # flat


def test_a_crop_is_the_photograph_itself() -> None:
    """128 pixels fit into brick.png's right quarter as they are."""
    train, held_out = build(128)
    for part in (train, held_out):
        region, (top, left) = part.regions[0], part.places[0]
        assert region.file.name == "brick.png" and region.zoom == 1
        whole = np.asarray(Image.open(region.file), dtype=np.float32)[None]
        top, left = top + region.box[1], left + region.box[0]
        expected = standardise(whole[:, top : top + 128, left : left + 128] / np.float32(255))
        np.testing.assert_array_equal(part.load(0)[0], expected)


def test_brightness_and_contrast_are_removed() -> None:
    crop = np.random.default_rng(0).uniform(0.3, 0.7, size=(3, 20, 20)).astype(np.float32)
    shades = np.array([0.2, 0.5, 0.9], dtype=np.float32)[:, None, None]
    np.testing.assert_allclose(standardise(crop * shades + 0.05), standardise(crop), atol=1e-5)
    np.testing.assert_allclose(standardise(crop).mean((1, 2)), 0.5, atol=1e-6)
    np.testing.assert_allclose(standardise(crop).std((1, 2)), 1 / 6, atol=1e-6)
    assert (standardise(np.full((1, 4, 4), 0.3, dtype=np.float32)) == 0.5).all()


def test_training_crops_depend_on_seed_and_index_alone_and_held_out_ones_on_neither() -> None:
    few, held_out = build(32)
    many, _ = build(32, crops=5)
    other, other_held_out = build(32, seed=1)
    np.testing.assert_array_equal(many.places[: len(few)], few.places)
    np.testing.assert_array_equal(many.labels[: len(few)], few.labels)
    assert torch.equal(many.read(np.arange(4, 36)), few.read(np.arange(4, 36)))
    assert (other.places != few.places).any()
    np.testing.assert_array_equal(other_held_out.places, held_out.places)


def test_held_out_crops_are_spread_over_the_region() -> None:
    _, held_out = build(64)
    for label, region in enumerate(held_out.regions):
        places = held_out.places[held_out.labels == label]
        assert len(np.unique(places, axis=0)) == 16
        np.testing.assert_array_equal(places.min(0), [0, 0])
        np.testing.assert_array_equal(places.max(0), region.room((64, 64)))


def test_pixels_do_not_depend_on_the_micro_batch() -> None:
    config = DataConfig(kind="textures", crops_per_class=4, flip=True, rotate=10.0, crop_min_area=0.5)
    train: Dataset = build_datasets(config, image_size=24, channels=1, num_classes=NUM_CLASSES, seed=0)[0]
    streams = [
        TrainStream(train, config=config, global_batch_size=30, micro_batch_size=m, data_rank=0, data_size=1, seed=0)
        for m in (30, 3)
    ]
    whole, parts = (torch.cat([b.images for b in next(s.steps(0)) if b.images is not None]) for s in streams)
    assert torch.equal(whole, parts)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size is 800 x 20, but only 303 x 96 .* coins\.png .* to 384 or less$"):
        build((800, 20))
    with pytest.raises(ValueError, match=r"image_size is 385 x 385, but .* to 384 or less$"):
        build(385)
    with pytest.raises(ValueError, match=r"model\.in_channels is 2: .* 1 channel \(grey\) or 3 \(RGB\)"):
        build(32, channels=2)
    with pytest.raises(ValueError, match=r"model\.num_classes is 4, but data\.kind=textures has \d+ classes"):
        build_datasets(DataConfig(kind="textures"), image_size=8, channels=1, num_classes=4, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(textures, "installed_folder", lambda *_, **__: tmp_path)
        with pytest.raises(ValueError, match=r"needs .*brick\.png, which is missing: install"):
            build(32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"data\.kind textures needs scikit-image, which is not installed: pip"):
        build(32)


def test_a_corrupt_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no photograph")
    crops = TextureCrops(
        [Region(file=tmp_path / "x.png", box=(0, 0, 8, 8), zoom=1.0)], np.zeros((1, 2), int), (1, 8, 8)
    )
    with pytest.raises(ValueError, match=r"x\.png cannot be decoded .*: install scikit-image anew"):
        crops.load(0)


def test_scikit_image_is_not_imported() -> None:
    before = set(sys.modules)
    build(32)[0].load(0)
    assert not any(name.split(".")[0] == "skimage" for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "textures", "crops_per_class": 0}, r"data\.crops_per_class is 0: it must be from 1"),
        ({"crops_per_class": 9}, r"data\.crops_per_class is 9, but has no effect .* set data\.kind to textures"),
        ({"kind": "textures", "size": 9}, r"data\.size is 9, but has no effect with data\.kind=textures"),
        ({"kind": "textures", "fold": 1}, r"data\.fold is 1, but has no effect with data\.kind=textures"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
