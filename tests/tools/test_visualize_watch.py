"""`tools.visualize --watch`: frames as a camera writes them, half-written ones too, until a signal comes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import UnreadableImageError
from engine.errors import ConfigError
from model import VisionTransformer
from parallel.process_group import World
from tests.model.small import TINY
from tools.visualize import __main__ as command
from tools.visualize import models, watch
from tools.visualize.watch import Frames


def frame(value: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.full((12, 12, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def put(path: Path, content: bytes, when: int) -> None:
    """A file, as if changed at this second."""
    path.write_bytes(content)
    os.utime(path, (when, when))


def read(path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.asarray(Image.open(path).convert("L")).copy())
    except (OSError, SyntaxError) as error:
        raise UnreadableImageError(f"{path} cannot be decoded") from error


def test_the_newest_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_PATIENCE", 0.05)
    frames = Frames(tmp_path, read)

    def newest() -> tuple[str, int] | None:
        found = frames.newest()
        return None if found is None else (found[0].name, int(found[1][0, 0]))

    assert newest() is None
    for i in range(3):
        put(tmp_path / f"{i}.png", frame(i), 100 + i)
    put(tmp_path / "3.png", frame(3)[:45], 103)  # the camera is at it
    put(tmp_path / ".hidden.png", frame(9), 109)
    put(tmp_path / "notes.txt", b"x", 109)
    assert newest() == ("2.png", 2) and frames.overtaken == 2
    assert newest() is None
    put(tmp_path / "3.png", frame(3), 104)
    assert newest() == ("3.png", 3) and newest() is None
    put(tmp_path / "3.png", frame(7), 105)  # a camera that has one file
    assert newest() == ("3.png", 7)
    put(tmp_path / "4.png", b"no image", 106)
    assert newest() is None
    time.sleep(0.06)
    assert newest() is None and frames.unreadable == 1 and "4.png cannot be decoded" in capsys.readouterr().out
    assert newest() is None and frames.unreadable == 1
    (tmp_path / "3.png").unlink()
    put(tmp_path / "3.png", frame(7), 105)
    assert newest() is None  # gone for too short a time to be noticed
    assert frames.overtaken == 2

    def changing(path: Path) -> torch.Tensor:
        found = read(path)
        put(path, frame(8), 300)
        return found

    put(tmp_path / "5.png", frame(5), 200)
    frames.read = changing
    assert newest() is None
    frames.read = read
    assert newest() == ("5.png", 8)
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        newest()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watched") / "model"
    VisionTransformer(replace(TINY, pool="gap", in_channels=3)).save_pretrained(path)
    return path


def argv(model: Path, folder: Path, *more: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return ["--checkpoint", str(model), "--watch", str(folder), "--out", str(folder / "maps"), *more]


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that ends programs; SIGINT is ignored in what a shell has started in the background, these tests too."""
    which: signal.Signals = request.param
    before = signal.signal(which, signal.default_int_handler)
    yield which
    signal.signal(which, before)


def test_until_a_signal_comes(
    number: signal.Signals,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "prepare_cpu", lambda world: None)
    before, picture = signal.getsignal(number), tmp_path / "in/maps/rollout-1.png"

    def camera() -> None:
        end = time.monotonic() + 60
        while signal.getsignal(number) is before and time.monotonic() < end:
            time.sleep(0.01)
        put(tmp_path / "in/0.png", frame(40)[:45], 100)
        put(tmp_path / "in/1.png", frame(90), 101)
        while not picture.exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    words = argv(model, tmp_path / "in", "--method", "rollout")
    thread = threading.Thread(target=camera)
    thread.start()
    assert command.main(words, World()) == 0
    thread.join()
    assert signal.getsignal(number) is before
    said = capsys.readouterr().out
    assert re.search(r"in all: 1 maps, \d+\.\d maps/s, \d+\.\d ms each; [01] frames overtaken, 0 unreadable", said), (
        said
    )
    with Image.open(picture) as image:
        assert image.size == (128, 128) and image.mode == "RGB"
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("gives 2 here: name one of --layers", ("--method", "mean")),
        ("gives 4 here: .* and one of --heads", ("--method", "heads", "--layers", "1")),
        ("takes frames one by one, and --method pca", ("--method", "pca")),
        ("takes frames one by one, and --method clusters", ("--method", "clusters")),
        ("takes no --batch", ("--method", "rollout", "--batch", "2")),
    ],
)
def test_refusals(
    words: str, more: Sequence[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "prepare_cpu", lambda world: None)
    with pytest.raises(ConfigError, match=words):
        command.main(argv(model, tmp_path / "in", *more), World())
