"""Evaluation's images against the definitions of timm (torchvision on Pillow) and big_vision (TensorFlow)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data import DataConfig, EvalStream, build_datasets
from data.showing import Showing, bilinear

Pixels = NDArray[np.float32]


@pytest.fixture
def photo(tmp_path: Path) -> tuple[str, NDArray[np.uint8]]:
    """75 x 50 pixels: a smooth picture with some noise, and a flat part."""
    y, x = np.mgrid[0:50, 0:75]
    smooth = np.stack([128 + 90 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), (x + y) * 2], axis=-1)
    levels = (smooth + np.random.default_rng(0).normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    levels[20:40, 30:60] = 100
    Image.fromarray(levels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png"), levels


def levels_of(showing: Showing, file: str, height: int, width: int) -> Pixels:
    """[H, W, C] in 0..255, whole numbers."""
    found = showing.show(file, (3, height, width)).transpose(1, 2, 0) * 255
    np.testing.assert_allclose(found, np.rint(found), atol=1e-4)
    return np.rint(found).astype(np.float32)


# (height, width), crop_pct -> what torchvision and timm resize to, (width, height), and where they cut, (left, top)
TIMM: list[tuple[tuple[int, int], float, tuple[int, int], tuple[int, int]]] = [
    ((28, 28), 0.875, (48, 32), (10, 2)),
    ((32, 32), 0.9, (52, 35), (10, 2)),  # 35.5 and 52.5 rounded down; 1.5 to the even 2
    ((48, 48), 1.0, (72, 48), (12, 0)),
    ((50, 50), 1.0, (75, 50), (12, 0)),  # as it is; 12.5 to the even 12
    ((32, 16), 1.0, (48, 32), (16, 0)),
    ((16, 48), 1.0, (48, 32), (0, 8)),
]


@pytest.mark.parametrize(("size", "crop_pct", "resized", "corner"), TIMM, ids=str)
def test_timms(
    photo: tuple[str, Any], size: tuple[int, int], crop_pct: float, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image, (height, width), (left, top) = Image.open(photo[0]), size, corner
    expected = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    found = levels_of(Showing("timm", crop_pct), photo[0], height, width)
    np.testing.assert_array_equal(found, np.asarray(expected, dtype=np.float32))


def area(levels: NDArray[np.uint8], down: int, across: int) -> NDArray[np.float64]:
    """Means of the areas that pixels cover, one by one."""
    source_height, source_width, _ = levels.shape
    found = np.zeros((down, across, 3))
    for i in range(down):
        for j in range(across):
            y0, y1 = i * source_height / down, (i + 1) * source_height / down
            x0, x1 = j * source_width / across, (j + 1) * source_width / across
            for y in range(math.floor(y0), min(source_height, math.ceil(y1))):
                for x in range(math.floor(x0), min(source_width, math.ceil(x1))):
                    part = (min(y1, y + 1) - max(y0, y)) * (min(x1, x + 1) - max(x0, x))
                    found[i, j] += part * levels[y, x]
            found[i, j] /= (y1 - y0) * (x1 - x0)
    return found


@pytest.mark.parametrize(("size", "shorter", "resized"), [(28, 32, (32, 48)), (56, 64, (64, 96))])
def test_big_visions(photo: tuple[str, NDArray[np.uint8]], size: int, shorter: int, resized: tuple[int, int]) -> None:
    down, across = resized
    top, left = (down - size) // 2, (across - size) // 2
    exact = area(photo[1], down, across)[top : top + size, left : left + size]
    found = levels_of(Showing("big_vision", size / shorter), photo[0], size, size)
    assert (np.floor(exact + 1e-3) == found).all()  # whole levels stay, others are cut off
    flat = found[(exact == 100).all(-1)]
    assert len(flat) and (flat == 100).all()


def test_big_visions_resize(photo: tuple[str, NDArray[np.uint8]]) -> None:
    import torch
    import torch.nn.functional as F

    source = torch.from_numpy(photo[1].astype(np.float64)).permute(2, 0, 1)[None]
    for size in ((28, 28), (64, 96), (50, 75)):
        expected = F.interpolate(source, size, mode="bilinear", align_corners=False)[0].numpy()
        np.testing.assert_allclose(
            bilinear(source[0].numpy().astype(np.float32), *size), expected, atol=1e-3
        )  # places are fp32
    found = levels_of(Showing("big_vision_resize", 1.0), photo[0], 28, 28)
    expected = F.interpolate(source, (28, 28), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    assert (np.floor(expected + 1e-3) == found).all()


def test_grey_and_16_bits(tmp_path: Path, photo: tuple[str, Any]) -> None:
    deep = np.full((40, 60), 0.265 * 65535).astype("<u2")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("timm", "big_vision", "big_vision_resize"):
        found = Showing(name, 0.9).show(str(tmp_path / "deep.png"), (1, 16, 16))  # type: ignore[arg-type]
        np.testing.assert_allclose(found, 0.265, atol=2e-5)
        assert Showing(name, 0.9).show(photo[0], (1, 16, 16)).shape == (1, 16, 16)  # type: ignore[arg-type]


def test_a_run_evaluates_so_and_trains_on_crops(folder: Path) -> None:
    keys: dict[str, Any] = {"kind": "image_folder", "path": str(folder), "mean": (0.0,), "std": (1.0,)}
    config = DataConfig(**keys, eval_transform="timm", crop_pct=0.9, crop_min_area=0.3)
    train, held_out = build_datasets(config, image_size=12, channels=3, num_classes=3, seed=0)
    showing = Showing("timm", 0.9)
    stream = EvalStream(held_out, config=config, micro_batch_size=len(held_out), data_rank=0, data_size=1)
    (batch,) = stream
    assert batch.images is not None
    expected = [showing.show(held_out.listing.file(i), (3, 12, 12)) for i in held_out.part.tolist()]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(batch.images.numpy(), np.stack(expected))
    usual, _ = build_datasets(DataConfig(**keys), image_size=12, channels=3, num_classes=3, seed=0)
    crop = np.array([[0.5, 1.0, 0.2, 0.8]])
    assert (train.read(np.array([0]), crop) == usual.read(np.array([0]), crop)).all()
    assert not (train.read(np.array([0])) == usual.read(np.array([0]))).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_transform": "timm"}, r"data\.eval_transform is 'timm', but has no effect with data\.kind=digits"),
        (
            {"kind": "image_folder", "path": "x", "crop_pct": 0.9},
            r"data\.crop_pct is 0\.9, but data\.eval_transform cen",
        ),
        (
            {"kind": "image_folder", "path": "x", "eval_transform": "timm", "crop_pct": 1.5},
            r"data\.crop_pct is 1\.5: it must be a part of a side, from 0\.1 to 1",
        ),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)
