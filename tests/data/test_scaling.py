"""Boxes scaled by the native module against torch: the same bits."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from data import DataConfig, TrainStream, build_datasets, scaling
from data.augment import augment, draw_augmentation
from data.decode import decode
from data.mixing import sample_order
from data.normalise import Normalise
from data.scaling import Finish, scaled


@pytest.fixture
def native() -> Any:
    found = scaling.native()
    if found is None:
        pytest.skip("the native module is not built, or not for this processor")
    assert "native" in scaling.scaler_name()
    return found


def test_its_bits_are_torchs(native: Any) -> None:
    """Boxes of all sizes in images of all sizes, made larger and smaller, of grey and colours, at the end of memory."""
    random = np.random.default_rng(0)

    def side(most: int) -> int:
        return round(most ** random.random())

    larger = smaller = 0
    for number in range(400):
        shape = (side(300), side(300), 3) if number % 4 else (side(300), side(300))
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        if number % 3 == 0:  # the extremes, where sums are largest
            pixels = (pixels >> 7) * np.uint8(255)
        top, left = int(random.integers(shape[0])), int(random.integers(shape[1]))
        bottom, right = int(random.integers(top, shape[0])) + 1, int(random.integers(left, shape[1])) + 1
        if number % 5 == 0:
            top, bottom, left, right = 0, shape[0], 0, shape[1]
        # One column of pixels torch makes otherwise on processors without AVX2.
        size = (shape[2] if len(shape) == 3 else 1, side(150), 1 + side(150))
        mean, std = random.random((2, size[0]), dtype=np.float32)
        finish = Finish(np.array([number % 2 == 1]), mean, std + np.float32(0.1)) if number % 7 else None
        found = scaled(pixels, (top, bottom, left, right), size, 255, finish)
        part = torch.from_numpy(pixels[top:bottom, left:right].reshape(bottom - top, right - left, -1))
        part = F.interpolate(part.permute(2, 0, 1)[None], size=size[1:], mode="bilinear", antialias=True)[0]
        expected = part.to(torch.float32).div_(255)
        if finish is not None:
            expected = expected.flip(-1) if number % 2 else expected
            expected = (expected - torch.from_numpy(mean)[:, None, None]) / torch.from_numpy(finish.std)[:, None, None]
        assert found.dtype == np.float32 and np.array_equal(found, expected.numpy()), (shape, top, bottom, left, right)
        larger, smaller = larger + (size[2] > right - left), smaller + (size[2] < right - left)
    assert larger > 50 and smaller > 50


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_files_are_the_same_without_it(native: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    y, x = np.mgrid[0:90, 0:130]
    waves = (x * y % 251).astype(np.uint8)
    deep = Image.fromarray((x * y).astype(np.uint16))
    file = BytesIO()
    colours = Image.fromarray(np.dstack([waves, waves // 2, 255 - waves]))
    (deep if mode == "I;16" else colours.convert(mode)).save(file, "PNG")

    def cut(channels: int) -> NDArray[np.float32]:
        some = np.array([0.3, 0.5, 0.2], np.float32)[:channels]
        finish, crop = Finish(np.array([True]), some, some), np.array([0.4, 1.2, 0.3, 0.7])
        return decode(BytesIO(file.getvalue()), crop, (channels, 37, 41), finish=finish)

    with_it = [cut(channels) for channels in (1, 3)]
    monkeypatch.setattr(scaling, "native", lambda: None)
    assert "torch" in scaling.scaler_name()
    for channels, found in zip((1, 3), with_it, strict=True):
        assert found.shape == (channels, 37, 41) and found.std() > 0.05 and np.array_equal(found, cut(channels))


def test_a_run_finishes_crops_as_other_images_are_finished(folder: Path) -> None:
    """With the module or without it: cropped, then mirrored, then normalised, of each the same ones."""
    colours: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    config = DataConfig(kind="image_folder", path=str(folder), crop_min_area=0.3, flip=True, **colours)
    train, _ = build_datasets(config, image_size=12, channels=3, num_classes=3, seed=0)
    sizes: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 8, "data_rank": 0, "data_size": 1}
    batch = next(TrainStream(train, config=config, seed=3, **sizes).steps(0))[0]
    drawn, indices = draw_augmentation(config, 3, 0, 8), sample_order(train, 3, config).indices(np.arange(8))
    assert 0 < drawn.mirror.sum() < 8
    images = augment(train.read(indices, drawn.crop), drawn, config, crop=False)
    assert batch.images is not None and torch.equal(batch.images, Normalise(config, channels=3)(images))


def test_it_refuses_what_it_would_read_wrongly(native: Any) -> None:
    pixels, out, ones = np.zeros((8, 9, 3), np.uint8), np.zeros((3, 4, 4), np.float32), np.ones(3, np.float32)
    for message, *wrong in (
        ("within the image", pixels, 0, 9, 0, 9, False, ones, ones, out),
        ("empty", pixels, 3, 3, 0, 9, False, ones, ones, out),
        ("within the image", pixels, 0, 8, -1, 9, False, ones, ones, out),
        ("pixels", pixels[..., :2], 0, 8, 0, 9, False, ones, ones, out),
        ("dense", pixels[:, ::2], 0, 8, 0, 5, False, ones, ones, out),
        ("dense", pixels[..., 0], 0, 8, 0, 9, False, ones, ones, out[:1]),
        ("out", pixels, 0, 8, 0, 9, False, ones, ones, out[:1]),
        ("mean, std", pixels, 0, 8, 0, 9, False, ones[:1], ones, out),
    ):
        with pytest.raises(ValueError, match=message):
            native.cut(*wrong)
    with pytest.raises(TypeError):
        native.cut(pixels.astype(np.float32), 0, 8, 0, 9, False, ones, ones, out)
