"""A run on a folder of images: what it says of them, writes of them, and how it ends where one cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pretrain_vit
from engine.run.launch import run_rank
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
    given = flags(run_dir=str(photos.parent / "run"), data__kind="image_folder", data__path=str(photos), **changes)
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


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_image_ends_in_one_line(photos: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in photos.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:60])
    assert run(photos, data__workers=workers) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"pretrain_vit.py: {photos}") and "cannot be decoded" in errors[0]


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
        argv = flags(**given | changes)
        size = argv.index("--data.size")
        return run_rank(pretrain_vit.main, argv[:size] + argv[size + 2 :], "pretrain_vit.py")

    assert attempt(train__stop_step="2") == 3
    assert "21 images in 3 shards" in (shown := capsys.readouterr().out) and "3 indexed now" in shown
    assert attempt(data__shuffle_window="2") == 2
    assert "in another order (Feistel, 16 rounds, and this run has" in capsys.readouterr().err
    (tmp_path / "s" / "01.tar").rename(tmp_path / "gone.tar")
    assert attempt() == 2 and "1 of 3 shards are missing" in (error := capsys.readouterr().err) and "01.tar" in error
    (tmp_path / "gone.tar").rename(tmp_path / "s" / "01.tar")
    assert attempt() == 0 and "the list of" not in capsys.readouterr().out
