"""`log.attention_interval`: what a run writes of attention, and what it says where that cannot be."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.checkpoint.config import CheckpointConfig
from engine.config import Config, LogConfig, TrainConfig
from engine.config.without_effect import without_effect
from engine.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from engine.run.trainer import pretrain
from engine.seeing.sheet import sheet
from parallel.grid import GridShape
from parallel.process_group import World
from tests.engine.small import small

LAYERS = [f"blocks.{i}" for i in range(4)] + ["head"]


def config_of(folder: Path, every: int = 2, images: int = 3, **train: Any) -> Config:
    return small(
        train=TrainConfig(steps=5, global_batch_size=8, **train), checkpoint=CheckpointConfig(save_interval=1),
        log=LogConfig(interval=1, attention_interval=every, attention_images=images), run_dir=str(folder),
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_written_and_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, whole, calm = tmp_path / "run", tmp_path / "whole", tmp_path / "calm"
    assert pretrain(config_of(folder, stop_step=3), World()) == EXIT_STOPPED
    maps = folder / "attention"
    assert sorted(path.name for path in maps.iterdir()) == ["step-00000002.npz", "step-00000002.png"]
    lost, others = maps / "step-00000005.png", maps / "step-mine.png"
    for path in (lost, others):
        path.write_bytes(b"of an attempt that was lost")
    assert pretrain(config_of(folder), World()) == EXIT_DONE
    steps = [2, 4, 5]
    names = [f"step-{step:08d}.{ending}" for step in steps for ending in ("npz", "png")]
    assert sorted(path.name for path in maps.iterdir()) == [*names, others.name]

    told = [line for line in lines(folder) if line["event"] == "attention"]
    assert [line["step"] for line in told] == steps
    keys = [f"{what}.{layer}" for what in ("entropy", "max_logit") for layer in LAYERS]
    assert all(list(line) == ["event", "step", *keys, "attention_time", "wall_time"] for line in told)
    arrays = np.load(maps / "step-00000005.npz")
    assert arrays["images"].shape == (3, 1, 8, 8) and arrays["blocks.3.maps"].shape == (3, 4, 2, 2)
    assert all(arrays[f"{layer}.max_logit"].max() == told[-1][f"max_logit.{layer}"] for layer in LAYERS)
    assert "attention at step 5 | least entropy " in capsys.readouterr().out

    board = EventAccumulator(str(folder), size_guidance={"images": 0})
    board.Reload()
    shown = board.Images("attention/maps")
    assert [event.step for event in shown] == steps
    assert shown[-1].encoded_image_string == lost.read_bytes()
    with Image.open(io.BytesIO(shown[-1].encoded_image_string)) as picture:
        assert picture.size == (shown[-1].width, shown[-1].height) == (6 * 100, 14 + 3 * 100)
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 20

    for other, every in ((whole, 2), (calm, 0)):
        assert pretrain(config_of(other, every), World()) == EXIT_DONE
    again = np.load(whole / "attention/step-00000005.npz")
    assert set(again) == set(arrays) and all(np.array_equal(again[name], arrays[name]) for name in again)
    losses = [[line["loss"] for line in lines(of) if line["event"] in ("train", "eval")] for of in (folder, calm)]
    assert losses[0] == losses[1] and not (calm / "attention").exists()


def test_refusals_and_what_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="attention_images is 9, but there are 8 held-out images: set it to at most 8"
    ):
        pretrain(config_of(tmp_path, images=9), World())
    with pytest.raises(ValueError, match="attention_interval is -1"):
        LogConfig(attention_interval=-1)
    config = config_of(tmp_path, every=0, images=9).resolve(1)
    idle = without_effect(config, GridShape(pipeline=1, data=1, context=1, tensor=1), "cpu", 5)
    assert "log.attention_images 9: log.attention_interval is 0" in idle

    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert pretrain(config_of(tmp_path, every=5), World()) == EXIT_DONE
    assert "step-00000005.png cannot be written: No space left on device; training goes on" in capsys.readouterr().out
    assert not list((tmp_path / "attention").iterdir())


def test_patches_that_reach_beyond_the_image() -> None:
    """Of 10 x 12 pixels and patches of 4, and of 8: the last of a map is where its pixels are."""
    maps = {"blocks.0": torch.zeros(1, 3, 3), "blocks.1": torch.zeros(1, 2, 2)}
    for of in maps.values():
        of[0, -1, -1] = 1
    picture = np.asarray(Image.open(io.BytesIO(sheet(torch.zeros(1, 1, 10, 12), maps, 4))))
    assert picture.shape[:2] == (14 + 8 * 10 + 4, 3 * (8 * 12 + 4))
    yellow = (picture[..., 0] > 200) & (picture[..., 2] < 100)
    for column in (1, 2):
        rows, cols = yellow[14:94, 100 * column : 100 * column + 96].nonzero()
        assert (rows.min(), rows.max(), cols.min(), cols.max()) == (64, 79, 64, 95)
