"""A run on a folder of images: what it says of them, writes of them, and how it ends where one cannot be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain_vit
from data import DataConfig, build_datasets
from engine.run.launch import run_rank
from model import VisionTransformer
from tests.data.tars import shards
from tests.engine.small import flags


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of six grey images."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "çat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, size=(12, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def run(photos: Path, **changes: str) -> int:
    given = {"run_dir": str(photos.parent / "run"), "data__kind": "image_folder", "data__path": str(photos)} | changes
    return launched(given)


def launched(changes: dict[str, str]) -> int:
    given = flags(**changes)
    size = given.index("--data.size")
    return run_rank(pretrain_vit.main, given[:size] + given[size + 2 :], "pretrain_vit.py")


def test_classes_and_counts_are_told_and_stored(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "ant" / "._0.png").touch()
    os.mkfifo(photos / "bee" / "pipe.png")
    assert run(photos) == 0
    shown = capsys.readouterr().out
    assert "data: image_folder, 14 training and 4 held-out images\n" in shown
    assert f"18 images of 3 classes in {photos}; left out: 1 hidden, 1 no regular files\n" in shown
    assert "warning: the model tells 10 classes apart, but there are images of 3: model.num_classes 3 would do" in shown
    assert json.loads((photos.parent / "run" / "classes.json").read_text()) == ["ant", "bee", "çat"]


def test_images_keep_their_aspect_ratio(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the whole run: its report, a worker, evaluation, and a checkpoint that an ordinary model takes."""
    changes = {"data__variable_resolution": "0.5", "model__image_size": "16", "data__workers": "1", "train__steps": "2"}
    assert run(photos, **changes) == 0
    said = "each image at its own aspect ratio, 8 to 24 patches of 4 pixels in training, up to 16 in evaluation"
    assert said in capsys.readouterr().out
    lines = [json.loads(line) for line in (photos.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line["event"] == "eval"] == [4]
    VisionTransformer.from_pretrained(photos.parent / "run" / "checkpoints").packed([torch.zeros(1, 12, 16)])
    assert run(photos, **changes, run_dir=str(photos.parent / "other"), log__attention_interval="1") == 2
    assert "data.variable_resolution is 0.5, and log.attention_interval 1" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_images_alone_end_in_one_line(photos: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in photos.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:60])
    assert run(photos, data__workers=workers) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("pretrain_vit.py: error: draw 0: sample ")
    assert f"others that were drawn in its place, the last: {photos}" in errors[0] and "cannot be decoded" in errors[0]


def test_bad_images_are_named_up_to_the_share_that_may_be(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 14 images to train on and 4 held out one each may be bad; two are too many, and with a share of 0 one is."""
    listed = build_datasets(
        DataConfig(kind="image_folder", path=str(photos)), image_size=8, channels=1, num_classes=None, seed=0
    )
    files = [[dataset.listing.file(i) for i in dataset.part] for dataset in listed]  # type: ignore[attr-defined]
    (photos.parent / files[0][3]).write_bytes(b"no image")
    (photos.parent / files[1][2]).write_bytes(b"\x89PNG")
    assert run(photos, train__steps="4") == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in (photos.parent / "run" / "bad_samples.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    assert [line["sample"] for line in train] == [3] * len(train) and 2 <= len(train) <= 3  # 32 draws of 14 images
    assert all(line["instead"] != 3 and files[0][3] in line["cause"] for line in train)
    assert [(line["event"], line["sample"]) for line in lines if line not in train] == [("eval", 2)]
    metrics = [json.loads(line) for line in (photos.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["bad_samples"] for line in metrics if line["event"] == "train"][-1] == len(train)
    assert [line["images"] for line in metrics if line["event"] == "eval"] == [3]
    assert "1 bad sample drawn anew, such as" in shown and "1 bad sample left out, such as" in shown
    assert run(photos, data__max_bad_share="0", run_dir=str(photos.parent / "strict")) == 2
    assert f"error: {files[0][3]} cannot be decoded" in capsys.readouterr().err
    (photos.parent / files[0][5]).write_bytes(b"no image")
    assert run(photos, train__steps="4", run_dir=str(photos.parent / "more")) == 2
    error = capsys.readouterr().err
    assert "2 of 14 training samples are bad so far, the last: " in error and "max_bad_share 0.01 allows 1: " in error
    assert len((photos.parent / "more" / "bad_samples.jsonl").read_text().splitlines()) >= 2


def test_held_out_images_that_are_all_bad_end_in_one_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the share that may be: there are no figures of none."""
    held_out = shutil.copytree(photos, photos.parent / "held_out")
    for file in held_out.glob("*/*.png"):
        file.write_bytes(b"no image")
    assert run(photos, data__val_path=str(held_out), data__max_bad_share="1") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "error: 18 of 18 held-out samples are bad so far, the last: " in errors[0], errors


def test_a_folder_that_cannot_be_read_is_a_wrong_configuration(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def locked(path: str) -> object:
        if str(path).endswith("bee/"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("data.listing.os.scandir", locked)
    assert run(photos) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "bee/ cannot be read (Permission denied)" in errors[0]


def test_a_run_on_shards_goes_on_in_its_order_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"run_dir": str(tmp_path / "run"), "data__kind": "webdataset", "data__path": shards(tmp_path / "s")}
    given |= {"train__steps": "4", "checkpoint__save_interval": "2"}

    def attempt(**changes: str) -> int:
        return launched(given | changes)

    assert attempt(train__stop_step="2") == 3
    assert "21 images in 3 shards" in (shown := capsys.readouterr().out) and "3 indexed now" in shown
    assert attempt(data__shuffle_window="2") == 2
    assert "in another order (Feistel, 16 rounds, and this run has" in capsys.readouterr().err
    (tmp_path / "s" / "01.tar").rename(tmp_path / "gone.tar")
    assert attempt() == 2 and "1 of 3 shards are missing" in (error := capsys.readouterr().err) and "01.tar" in error
    (tmp_path / "gone.tar").rename(tmp_path / "s" / "01.tar")
    assert attempt() == 0 and "the list of" not in capsys.readouterr().out
