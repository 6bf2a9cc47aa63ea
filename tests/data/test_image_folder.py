from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataConfig, Dataset, TrainStream, build_datasets


def build(path: Path, *, channels: int = 3, val_path: Path | None = None, fold: int = 0) -> tuple[Dataset, Dataset]:
    config = DataConfig(
        kind="image_folder", path=str(path), val_path=None if val_path is None else str(val_path), fold=fold
    )
    return build_datasets(config, image_size=(8, 12), channels=channels, num_classes=3, seed=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_one_shape(folder: Path, channels: int) -> None:
    train, held_out = build(folder, channels=channels)
    assert train.image_shape == (channels, 8, 12) and train.num_classes == 3
    images = train.read(np.arange(len(train)))
    assert images.shape == (len(train), channels, 8, 12) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    pixels, label = train.load(3)
    np.testing.assert_array_equal(pixels, images[3].numpy())
    assert label == train.labels[3]
    assert len(train) + len(held_out) == 18 and set(held_out.labels) == {0, 1, 2}


def test_folds_are_disjoint_and_cover_everything(folder: Path) -> None:
    held_out = [build(folder, fold=fold)[1] for fold in range(5)]
    assert sum(map(len, held_out)) == 18
    images = torch.cat([h.read(np.arange(len(h))) for h in held_out])
    assert len(torch.unique(images.flatten(1), dim=0)) == 18


def test_a_fingerprint_tells_other_files_and_labels_but_not_other_places(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    expected = [part.fingerprint for part in build(folder)]
    assert [part.fingerprint for part in build(tmp_path / "elsewhere")] == expected and len(set(expected)) == 2
    assert build(folder, fold=1)[0].fingerprint != expected[0]
    train = build(folder, val_path=folder)[0].fingerprint
    (folder / "ant" / "0.png").rename(folder / "ant" / "0.bmp")
    assert build(folder, val_path=folder)[0].fingerprint != train
    (folder / "ant" / "0.bmp").rename(folder / "bee" / "0.bmp")
    assert build(folder, val_path=folder)[0].fingerprint != train


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 48, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.PNG")
    config = DataConfig(kind="image_folder", path=str(tmp_path), val_path=str(tmp_path))
    train, _ = build_datasets(config, image_size=(8, 12), channels=3, num_classes=1, seed=0)
    expected = Image.fromarray(pixels).resize((24, 8), Image.Resampling.BILINEAR).crop((6, 0, 18, 8))
    np.testing.assert_allclose(train.load(0)[0], np.asarray(expected).transpose(2, 0, 1) / 255, atol=1e-6)


def test_crops_see_the_full_resolution(tmp_path: Path) -> None:
    """A crop of a large JPEG, which is decoded at a reduced size, against the crop of the whole image."""
    y, x = np.mgrid[0:160, 0:240]
    pixels = np.stack([x, y, x // 2 + y // 2], axis=-1).astype(np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.jpg", quality=98)
    config = DataConfig(kind="image_folder", path=str(tmp_path), val_path=str(tmp_path))
    train, _ = build_datasets(config, image_size=(8, 12), channels=3, num_classes=1, seed=0)
    crop = np.array([[0.25, 1.0, 1.0, 0.0]])  # the top right quarter
    box = Image.fromarray(pixels).resize((12, 8), Image.Resampling.BILINEAR, box=(120, 0, 240, 80))
    expected = np.asarray(box).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(train.read(np.array([0]), crop)[0].numpy(), expected, atol=0.02)


def test_random_crops_fill_the_image_without_padding(folder: Path) -> None:
    config = DataConfig(kind="image_folder", path=str(folder), crop_min_area=0.2, flip=True, mean=(0,), std=(1,))
    train, _ = build_datasets(config, image_size=8, channels=3, num_classes=3, seed=0)
    streams = [
        TrainStream(train, config=config, global_batch_size=30, micro_batch_size=m, data_rank=0, data_size=1, seed=0)
        for m in (30, 3)
    ]
    whole, parts = (torch.cat([b.images for b in next(s.steps(0)) if b.images is not None]) for s in streams)
    assert torch.equal(whole, parts)
    assert (whole.amax(dim=(1, 2, 3)) > 0.3).all() and len(torch.unique(whole.flatten(1), dim=0)) == 30


def test_corrupt_file_is_named(folder: Path) -> None:
    (folder / "bee" / "3.png").write_bytes((folder / "bee" / "3.png").read_bytes()[:200])
    train, held_out = build(folder)
    with pytest.raises(ValueError, match=r"bee.3\.png cannot be decoded .*: replace or remove this file"):
        train.read(np.arange(len(train)))
        held_out.read(np.arange(len(held_out)))


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere is not a folder"):
        build(tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match=r"data\.path=.*hollow has no sub-folders"):
        build(tmp_path / "hollow")
    (tmp_path / "hollow" / "ant").mkdir()
    with pytest.raises(ValueError, match=r"data\.val_path=.*hollow has no images .* in \['ant'\]"):
        build(folder, val_path=tmp_path / "hollow")
    with pytest.raises(ValueError, match=r"1 channel \(grey\) or 3 \(RGB\), not 2"):
        build(folder, channels=2)


def test_classes_must_agree(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "val")
    train, held_out = build(folder, val_path=tmp_path / "val")
    assert len(train) == len(held_out) == 18
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(ValueError, match=r"only in data\.path \['cat'\], only in data\.val_path \['dog'\]"):
        build(folder, val_path=tmp_path / "val")


def test_classes_too_small_to_split(folder: Path) -> None:
    for i in range(2):
        (folder / "cat" / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"class 'cat' .* has 4 images.* data\.val_path"):
        build(folder)
