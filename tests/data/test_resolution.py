"""Images at their own aspect ratio: how many patches each has, how few are unused, the same pixels in any layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import Batch, DataConfig, Dataset, EvalStream, TrainStream, build_datasets
from data.datasets import ArrayDataset
from data.decode import CENTRE, sides
from data.joined import Joined, JoinedClasses
from data.resolution import Resolution, map_of
from tests.data.tars import write_tar

# Of photographs as sets have them, rows and columns.
SIZES = [(375, 500), (500, 375), (333, 500), (500, 333), (500, 500), (480, 640), (1080, 1920), (427, 640), (281, 500)]
CONFIG = DataConfig(variable_resolution=0.5, flip=True, crop_min_area=0.5, rotate=5.0, brightness=0.2, erase=0.5)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten files, of other shapes; one is turned by its EXIF orientation."""
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(20):
        rows, cols = (40, 20 + 2 * number) if number % 3 else (20 + number, 60)
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 4 else 1
        Image.fromarray(generator.integers(0, 256, (rows, cols, 3), dtype=np.uint8)).save(file, exif=exif)
    return folder


def sets_of(config: DataConfig = CONFIG, **options: Any) -> tuple[Dataset, Dataset]:
    usual: dict[str, Any] = {"image_size": 16, "channels": 1, "num_classes": 10, "seed": 0, "patch_size": 2}
    return build_datasets(config, **usual | options)


def first_step(dataset: Dataset, config: DataConfig, micro: int, ranks: int, **options: Any) -> list[Batch]:
    """Of all data ranks, in order."""
    batches = list[Batch]()
    for rank in range(ranks):
        place = {"data_rank": rank, "data_size": ranks, "micro_batch_size": micro}
        stream = TrainStream(dataset, config=config, global_batch_size=16, seed=3, **place, **options)
        batches += next(stream.steps(2))
    return batches


def images_of(batches: list[Batch], patches: int) -> list[torch.Tensor]:
    """The patches of each image; what is unused must be zero."""
    found = list[torch.Tensor]()
    for batch in batches:
        assert batch.maps is not None and batch.images is not None
        counts = [rows * cols for rows, cols in batch.maps]
        assert len(batch.images) == patches * len(counts)  # static
        *each, rest = batch.images.split([*counts, len(batch.images) - sum(counts)])
        assert not rest.any()
        found += each
    return found


def test_few_patches_are_unused() -> None:
    """Less than two per cent from 64 patches on, and aspect ratios as near as whole patches allow (`docs/data.md`)."""
    generator = np.random.default_rng(1)
    for patches, unused, off in ((64, 0.02, 0.1), (196, 0.012, 0.06), (576, 0.008, 0.04)):
        resolution = Resolution(patch=16, patches=patches, spread=patches // 2)
        images = np.array(SIZES)[generator.integers(0, len(SIZES), 2000)]
        maps = np.array(resolution.training(images, 0, 10))
        ratios, counts = maps[:, 1] / maps[:, 0] * images[:, 0] / images[:, 1], maps.prod(1)
        assert np.abs(ratios - 1).mean() < off
        pairs = counts.reshape(-1, 2).sum(1)
        assert pairs.max() <= 2 * patches and 0 <= 1 - pairs.mean() / (2 * patches) < unused
        assert counts.max() <= 1.5 * patches and counts.min() > 0.4 * patches  # the first may leave some of its own
        for place in (0, 1):  # neither of a pair is favoured
            assert counts[place::2].mean() == pytest.approx(patches, rel=0.05)
            assert counts[place::2].std() == pytest.approx(patches / 2 / 3**0.5, rel=0.1)
    for height, width in SIZES:
        for most in range(150, 250):
            rows, cols = map_of(height, width, most)
            assert rows * cols <= most and 0.75 < (cols / rows) / (width / height) < 1.25
    assert map_of(1, 1000, 196) == (1, 196) and map_of(1000, 1, 196) == (196, 1) and map_of(7, 3, 1) == (1, 1)


def test_any_layout_has_the_same_images() -> None:
    """Micro-batches and data ranks of any size, workers or none; ranks without images know the same maps."""
    dataset, _ = sets_of()
    whole = first_step(dataset, CONFIG, 16, 1)
    expected = images_of(whole, 64)
    assert len({len(image) for image in expected}) > 5
    assert sum(map(len, expected)) > 0.9 * 16 * 64
    for micro, ranks, workers in ((2, 1, 0), (4, 2, 1)):
        config = replace(CONFIG, workers=workers)
        ours = images_of(first_step(dataset, config, micro, ranks), 64)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    maps = [batch.maps for batch in first_step(dataset, CONFIG, 16, 1, with_images=False)]
    assert maps == [batch.maps for batch in whole]
    with pytest.raises(ValueError, match=r"micro_batch_size is 1, .* use an even number"):
        first_step(dataset, CONFIG, 1, 1)


def test_files_keep_their_aspect_ratio(photographs: Path) -> None:
    """As their EXIF orientation has it; each is its whole image, scaled as any other file is."""
    assert sides(str(photographs / "a" / "4.png")) == (28, 40)
    config = DataConfig(kind="image_folder", path=str(photographs), variable_resolution=0.5, mean=(0.0,), std=(1.0,))
    train, held_out = sets_of(config, image_size=(16, 12), channels=3)
    assert any("24 to 72" in line for line in [held_out.resolution.describe()] if held_out.resolution)
    (batch,) = EvalStream(held_out, config=config, micro_batch_size=6, data_rank=0, data_size=1)
    assert batch.maps is not None and batch.maps[4:] == ((1, 1), (1, 1)) and batch.weights.tolist() == [1] * 4 + [0] * 2
    for index, (patches, shape) in enumerate(zip(images_of([batch], 48), batch.maps[:4], strict=False)):
        ((height, width),) = held_out.sides(np.array([index])).tolist()
        assert shape == map_of(height, width, 48)
        file = Image.open(held_out.listing.file(int(held_out.part[index])))  # type: ignore[attr-defined]
        upright = file.transpose(Image.Transpose.ROTATE_270) if file.getexif().get(0x0112) == 6 else file
        plain = np.asarray(upright.resize((2 * shape[1], 2 * shape[0]), Image.Resampling.BILINEAR)) / 255
        ours = patches.view(*shape, 3, 2, 2).permute(2, 0, 3, 1, 4).reshape(3, 2 * shape[0], 2 * shape[1])
        np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), plain, atol=2 / 255)
    drawn = first_step(train, replace(config, crop_min_area=0.3), 8, 2)
    few, _ = sets_of(replace(config, images_per_class=3), image_size=(16, 12), channels=3)
    assert few.resolution is not None and len(few) == 6 and len({*map(tuple, few.sides(np.arange(6)).tolist())}) > 3
    assert all(image.isfinite().all() and image.std() > 0 for image in images_of(drawn, 48))


def test_tar_files_give_what_folders_give(photographs: Path, tmp_path: Path) -> None:
    """The same bytes as samples of a tar file, in the same order."""
    folder = DataConfig(kind="image_folder", path=str(photographs), val_path=str(photographs), variable_resolution=0.5)
    _, files = sets_of(folder, channels=3)
    names = [Path(files.listing.file(n)) for n in range(len(files))]  # type: ignore[attr-defined]
    samples = [(f"{n:02d}", {"png": name.read_bytes(), "cls": b"0"}) for n, name in enumerate(names)]
    shard = str(write_tar(tmp_path / "0.tar", samples))
    tar = replace(folder, kind="webdataset", path=shard, val_path=shard)
    _, shards = sets_of(tar, channels=3)
    (ours,), (theirs,) = (
        EvalStream(held_out, config=config, micro_batch_size=20, data_rank=0, data_size=1)
        for held_out, config in ((shards, tar), (files, folder))
    )
    assert ours.maps == theirs.maps and len(set(ours.maps or ())) > 4
    assert ours.images is not None and theirs.images is not None and torch.equal(ours.images, theirs.images)
    both, numbers = Joined([files, shards], JoinedClasses(count=0, names=None, numbers=None), None), np.arange(20)
    assert (both.sides(np.arange(40)) == np.tile(shards.sides(numbers), (2, 1))).all()
    cuts = [of.read_sized(index, CENTRE, (3, 6, 8)) for of, index in ((both, 25), (shards, 5))]
    assert (cuts[0] == cuts[1]).all()


def test_bad_images_are_left_out_and_stood_in_for(photographs: Path, tmp_path: Path) -> None:
    folder = str(shutil.copytree(photographs, tmp_path / "photographs"))
    (tmp_path / "photographs" / "a" / "4.png").write_bytes(b"no image")
    config = DataConfig(kind="image_folder", path=folder, val_path=folder, variable_resolution=0.5, max_bad_share=0.1)
    train, held_out = sets_of(config, channels=3)
    stream = EvalStream(held_out, config=config, micro_batch_size=20, data_rank=0, data_size=1, leaves_out=True)
    (batch,) = stream
    index = stream.bad[0].sample
    assert batch.maps is not None and batch.maps[index] == (1, 1)
    assert batch.weights.sum() == 19 and batch.weights[index] == 0
    training = TrainStream(
        train, config=config, global_batch_size=20, micro_batch_size=4, data_rank=0, data_size=1, seed=0
    )
    drawn = [*next(training.steps(0))]
    assert [bad.sample for bad in training.bad] == [index] and len(images_of(drawn, 64)) == 20


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"variable_resolution": 1.0}, {}, "from 0 to below 1"),
        ({"variable_resolution": 0.01}, {}, "use 0.0156 or more"),
        ({}, {"patch_size": None}, "set it to 0"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sets_of(DataConfig(**{"variable_resolution": 0.5} | change), **options)


def test_sets_that_do_not_tell_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayDataset, "tells_sides", False)
    with pytest.raises(ValueError, match=r"data.kind=digits does not tell .* set it to 0"):
        sets_of()
