"""Stopping after any step and going on gives the bits of the run that never stopped: metrics, curves, state."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from data import DataConfig
from engine.checkpoint import folder as folders
from engine.checkpoint.config import CheckpointConfig
from engine.config import (
    Config,
    LogConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecomputeConfig,
    ScheduleConfig,
    TrainConfig,
    plain,
)
from engine.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DivergedError, OutputError
from engine.run.changed import changed_keys
from engine.run.loop import Loop
from engine.run.saving import Saving
from engine.run.trainer import pretrain
from parallel.checkpoint.read import Reader
from parallel.process_group import World
from tests.engine.small import small

STEPS = 9
TIMES = (
    "step_time", "images_per_second", "tokens_per_second", "tflops_per_device", "mfu", "peak_memory", "data_time",
    "data_wait", "data_work", "wall_time", "eval_time", "bubble",
)  # fmt: skip
AUGMENTED: dict[str, Any] = {
    "rotate": 10.0, "shift": 0.1, "scale": 0.2, "flip": True, "crop_min_area": 0.5, "rand_augment": "rand-m7-n1",
    "erase": 0.3, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip


def config_of(folder: Path, **changes: Any) -> Config:
    """Lines every 3 steps, evaluations every 4, a warm-up of 2 of the 9 steps, drop-path, augmentation."""
    train = {"steps": STEPS, "global_batch_size": 8, "eval_interval": 4} | changes.pop("train", {})
    groups: dict[str, Any] = {
        "data": DataConfig(kind="synthetic", size=36, **AUGMENTED),
        "optimizer": OptimizerConfig(ema_decay=0.9),
        "schedule": ScheduleConfig(name="cosine", warmup_steps=2),
        "log": LogConfig(interval=3),
        "checkpoint": CheckpointConfig(keep=None),
        "width": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2,
    }  # fmt: skip
    return small(**groups | changes, train=TrainConfig(**train), run_dir=str(folder))


def run(config: Config, *, until: int | None = None, **changes: Any) -> None:
    """An attempt: to the end, or stopped after a step."""
    checkpoint = replace(config.checkpoint, **changes)
    code = pretrain(replace(config, train=replace(config.train, stop_step=until), checkpoint=checkpoint), World())
    assert code == (EXIT_DONE if until is None else EXIT_STOPPED)


def lines(folder: Path, *events: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line["event"] in events]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Those of train, eval and bad_step."""
    seen = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    tags = [t for t in seen.Tags()["scalars"] if t.partition("/")[2] not in TIMES and not t.startswith("save/")]
    return {tag: [(event.step, event.value) for event in seen.Scalars(tag)] for tag in tags}


def state(folder: Path, step: int) -> dict[str, Tensor]:
    with Reader(folder / "checkpoints" / f"step-{step:08d}") as reader:
        return {name: reader.whole(name) for name in reader.manifest.tensors}


def progress(folder: Path, step: int) -> dict[str, Any]:
    with Reader(folder / "checkpoints" / f"step-{step:08d}") as reader:
        return {key: value for key, value in reader.manifest.progress.items() if key != "train_seconds"}


def assert_equal(ours: Path, theirs: Path, step: int = STEPS) -> None:
    """All that a run leaves behind, but for times and the lines of its saves."""
    assert lines(ours, "train", "eval", "bad_step") == lines(theirs, "train", "eval", "bad_step")
    assert str(curves(ours)) == str(curves(theirs)) and curves(ours)  # str: NaN is NaN
    assert progress(ours, step) == progress(theirs, step)
    a, b = state(ours, step), state(theirs, step)
    assert a.keys() == b.keys() and len(a) > 30
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert len(list(ours.glob("events*"))) == 1


def image_folder(path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (path / name).mkdir(parents=True)
        for number in range(7):
            Image.fromarray(rng.integers(0, 256, size=(12 + number, 18, 3), dtype=np.uint8)).save(
                path / name / f"{number}.png"
            )
    return path


def fp16(**changes: Any) -> dict[str, Any]:
    """Whose first steps overflow, whose scale grows and falls again."""
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**19, "loss_scale_window": 2, "hysteresis": 2} | changes
    return {"precision": PrecisionConfig(**precision)}


# What is kept from step to step: each optimizer's state, the average, loss scale, fp8 histories.
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw, fp32": {},
    "adamw, fp16": fp16(),
    "adamw, bf16, mixed": {"precision": PrecisionConfig(dtype="bf16", high_layers=("embed", "head"))},
    "adamw, fp8": {"precision": PrecisionConfig(dtype="fp8", fp8_history=4), "width": 32, "mlp_dim": 64},
    "adafactor, bf16": {
        "optimizer": OptimizerConfig(name="adafactor", ema_decay=0.5, decay_by="schedule"),
        "precision": PrecisionConfig(dtype="bf16"),
    },
    "lamb, fp16": fp16() | {"optimizer": OptimizerConfig(name="lamb")},
    "muon, fp32": {
        "optimizer": OptimizerConfig(name="muon", ema_decay=0.9, layer_decay=0.8),
        "schedule": ScheduleConfig(name="rsqrt", warmup_steps=3, cooldown_steps=4, timescale=2.0),
        "train": {"freeze": ("embed", "blocks.0")},
    },
    "muon, fp8": {
        "optimizer": OptimizerConfig(name="muon"),
        "precision": PrecisionConfig(dtype="fp8", fp8_history=3), "width": 32, "mlp_dim": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_does_not(tmp_path: Path, name: str) -> None:
    """Stops in the middle of a log interval, at its end, in warm-up, at an evaluation, after skipped steps; in turn."""
    straight = tmp_path / "straight"
    run(config_of(straight, **VARIANTS[name]))
    if "fp16" in name:
        found = lines(straight, "train")
        assert 0 < found[-1]["skipped_steps"] < STEPS and len({line["loss_scale"] for line in found}) > 1
    config = config_of(tmp_path / "stopped", **VARIANTS[name])
    for stop in (1, 3, 4, 5, 8):
        run(config, until=stop, async_save=stop % 2 == 0)
    run(config, resume="must")
    assert_equal(tmp_path / "stopped", straight)


def test_workers_decode_and_augment_the_same_images(tmp_path: Path) -> None:
    data = DataConfig(kind="image_folder", path=str(image_folder(tmp_path / "images")), workers=2, **AUGMENTED)
    changes = {"data": data, "num_classes": 3, "in_channels": 3}
    run(config_of(tmp_path / "straight", **changes | {"data": replace(data, workers=0)}))
    config = config_of(tmp_path / "stopped", **changes)
    for stop in (2, 5):
        run(config, until=stop, async_save=True)
    run(config)
    assert_equal(tmp_path / "stopped", tmp_path / "straight")


# -- what is not finite, and attempts that are lost --------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, bad: Sequence[int]) -> None:
    """Make the images of some steps NaN."""
    train = Loop._train

    def poisoned(loop: Loop, step: int, batches: Any) -> Any:
        if step in bad:
            batches = [replace(batch, images=batch.images * float("nan")) for batch in batches]
        return train(loop, step, batches)

    monkeypatch.setattr(Loop, "_train", poisoned)


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_bad_steps_before_and_after_a_stop_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    fp8 = {"width": 32, "mlp_dim": 64} if dtype == "fp8" else {}
    changes: dict[str, Any] = {"precision": PrecisionConfig(dtype=dtype), **fp8}  # type: ignore[arg-type]
    poison(monkeypatch, bad=(4, 5, 8))
    run(config_of(tmp_path / "straight", **changes))
    assert [line["step"] for line in lines(tmp_path / "straight", "bad_step")] == [4, 5, 8]
    config = config_of(tmp_path / "stopped", **changes)
    for stop in (4, 5, 8):
        run(config, until=stop)
    run(config)
    assert_equal(tmp_path / "stopped", tmp_path / "straight")
    impatient = config_of(tmp_path / "impatient", train={"max_bad_steps": 2}, **changes)
    run(impatient, until=4)
    with pytest.raises(DivergedError, match="2 steps in a row"):
        run(impatient)


class Lost(OSError):
    """What a process that is killed does not outlive."""


def lose(monkeypatch: pytest.MonkeyPatch, config: Config, step: int, place: str, **changes: Any) -> None:
    """An attempt that ends without a word: at the end of a step, or in a save."""
    owner, name = {"step": (Loop, "_count"), "save": (Saving, "save"), "commit": (folders, "commit")}[place]
    original, armed = getattr(owner, name), True

    def losing(*args: Any) -> Any:
        at = args[1] if place != "commit" else args[1].step
        if at == step and armed:
            raise Lost
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises((Lost, OutputError)):
        patch.setattr(owner, name, losing)
        run(config, **changes)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # a process takes its threads with it
            thread.join()


@pytest.mark.parametrize("async_save", [False, True])
def test_what_a_lost_attempt_did_after_its_last_save_is_cut_and_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = fp16() | {"log": LogConfig(interval=1), "checkpoint": CheckpointConfig(save_interval=3)}
    run(config_of(tmp_path / "straight", **changes))
    config = config_of(tmp_path / "lost", **changes)
    lose(monkeypatch, config, 2, "step")  # nothing was saved
    lose(monkeypatch, config, 5, "step", async_save=async_save)
    capsys.readouterr()
    lose(monkeypatch, config, 6, "save", async_save=async_save)
    assert async_save or "step 3 of 9" in capsys.readouterr().out
    lose(monkeypatch, config, 8, "step", async_save=async_save)
    assert {line["step"] for line in lines(tmp_path / "lost", "train")} == set(range(1, 8))
    lose(monkeypatch, config, 9, "commit", async_save=async_save)
    run(config, async_save=async_save)
    assert_equal(tmp_path / "lost", tmp_path / "straight")
    if not async_save:  # else the line comes at a later step, which may be lost
        assert [line["saved_step"] for line in lines(tmp_path / "lost", "save")] == [3, 6, 9]
    assert sorted(path.name for path in (tmp_path / "lost/checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in (3, 6, 9)
    ]


# -- what has changed since --------------------------------------------------------------------------------------------


def stopped_at(folder: Path, step: int, **changes: Any) -> Config:
    """A run that was stopped there."""
    config = config_of(folder, **changes)
    run(config, until=step)
    return config


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("resume:", "warning: the list"))]


@pytest.mark.parametrize("batches", [(8, 4), (4, 12)])
def test_another_batch_goes_on_with_the_next_image_to_the_end_of_the_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batches: tuple[int, int]
) -> None:
    drawn: list[int] = []
    train = Loop._train

    def recording(loop: Loop, step: int, given: Any) -> Any:
        drawn.extend(int(i) for batch in given for i in batch.sample_ids)
        return train(loop, step, given)

    monkeypatch.setattr(Loop, "_train", recording)
    before, after = batches
    config = stopped_at(tmp_path, 3, train={"steps": None, "epochs": 2.0, "global_batch_size": before})
    capsys.readouterr()
    run(replace(config, train=replace(config.train, global_batch_size=after)))
    lines_said = [line for line in said(capsys) if "train.global_batch_size" in line]
    assert len(lines_said) == 1 and f"train.global_batch_size {before} -> {after}" in lines_said[0]
    assert drawn == list(range(len(drawn)))  # draw i of an epoch is another image than any other
    assert 0 <= len(drawn) - 2 * 36 < after
    last = lines(tmp_path, "train")[-1]
    assert (last["samples"], last["epoch"]) == (len(drawn), len(drawn) / 36)


def test_more_steps_and_another_rate_are_told_once_and_take_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides, a batch script is told of what has been saved, and of what a run goes on from."""
    monkeypatch.setenv("VITRUVIUS_CHECKPOINTS", str(tmp_path / "told"))
    config = stopped_at(tmp_path, 4)
    capsys.readouterr()
    config = replace(config, recompute=RecomputeConfig(policy="full"))  # which changes no number, so it is not told
    run(replace(config, train=replace(config.train, steps=12), optimizer=replace(config.optimizer, lr=2e-3)))
    told = said(capsys)
    assert "step 4 of 12" in told[0] and told[1:] == [
        "resume: changed since: train.steps 9 -> 12; optimizer.lr 0.001 -> 0.002"
    ]
    assert [line["step"] for line in lines(tmp_path, "train")] == [3, 6, 9, 12]
    assert lines(tmp_path, "train")[1]["lr"] > 1e-3
    noted = (tmp_path / "told").read_text().splitlines()
    assert all(Path(path).parent.name == "checkpoints" for path in noted)
    assert [Path(path).name for path in noted] == ["step-00000004", "step-00000004", "step-00000012"]


BF16 = {"precision": PrecisionConfig(dtype="bf16")}
OTHER_DATA: dict[str, Any] = {
    "data": DataConfig(kind="synthetic", size=32), "checkpoint": CheckpointConfig(keep=None, accept_other_data=True),
}  # fmt: skip
CHANGED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {"optimizer": OptimizerConfig()}, "optimizer.ema_decay 0.9 -> null", "state of average"),
    ({"optimizer": OptimizerConfig()}, {}, "optimizer.ema_decay null -> 0.9", "state of average"),
    ({"train": {"freeze": ("embed",)}}, {}, "train.freeze", "state of optimizer"),
    ({}, {"train": {"freeze": ("embed", "blocks.0")}}, "train.freeze", "state of optimizer"),
    (BF16, fp16(initial_loss_scale=2.0**10), "precision.dtype bf16 -> fp16", "state of loss_scale"),
    (fp16(), {}, "precision.dtype fp16 -> fp32", "state of loss_scale"),
    ({}, OTHER_DATA, "data.size 36 -> 32", "warning: the list of training images"),
    ({}, {"drop_path": 0.0}, "model.drop_path 0.2 -> 0.0", "resume: from"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "key", "also"), CHANGED, ids=[key for _, _, key, _ in CHANGED])
def test_what_changed_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: dict[str, Any],
    after: dict[str, Any],
    key: str,
    also: str,
) -> None:
    stopped_at(tmp_path, 4, **before)
    weights = {name: values for name, values in state(tmp_path, 4).items() if name.startswith("weights/")}
    capsys.readouterr()
    config = config_of(tmp_path, **after)
    run(config, until=5)
    told = said(capsys)
    assert sum(key in line for line in told) == 1
    assert any(also in line for line in told)
    moved = {name for name, values in state(tmp_path, 5).items() if name in weights and (values != weights[name]).any()}
    assert bool(moved) and not any(name.startswith("weights/embed") for name in moved if config.train.freeze)


OTHER_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"width": 24}, r"another model: .*blocks\.0.*\[\d+.*\] in the checkpoint, \[\d+.*and \d+ more"),
    ({"depth": 3}, r"another model: blocks\.2\.\S+: none in the checkpoint"),
    ({"num_classes": 7}, r"another model: head\.\S+: \[10\] in the checkpoint, \[7\] here"),
    ({"num_heads": 4}, r"another model: model\.num_heads 2 -> 4"),
    ({"gelu": "tanh"}, r"another model: model\.gelu erf -> tanh"),
    ({"norm_after_pool": True}, r"another model: model\.norm_after_pool False -> True"),
    ({"optimizer": OptimizerConfig(name="lamb", ema_decay=0.9)}, r"optimizer adamw.*lamb"),
    ({"train": {"seed": 5}}, r"with other data: train\.seed 0 -> 5; training images 36 of .*accept_other_data true"),
    ({"data": OTHER_DATA["data"]}, r"with other data: training images 36 of \w+ -> 32 of \w+\. "),
]


def test_what_is_of_another_model_or_optimizer_is_refused_and_nothing_touched(tmp_path: Path) -> None:
    stopped_at(tmp_path, 4)
    before = contents(tmp_path)
    for changes, message in OTHER_MODELS:
        with pytest.raises(ConfigError, match=message) as refused:
            run(config_of(tmp_path, **changes))
        assert str(refused.value).count(" in the checkpoint, ") <= 10
    assert contents(tmp_path) == before


def test_a_key_that_is_younger_than_the_checkpoint_has_its_usual_value_there() -> None:
    config = small(pool="cls").resolve(1)
    stored = plain(asdict(config))
    for key in ("class_tokens", "norm_after_pool", "patch_bias", "qkv_bias", "norm_eps"):
        del stored["model"][key]
    manifest: Any = SimpleNamespace(config=stored)
    assert changed_keys(config, manifest) == []
    other = small(pool="cls", class_tokens=2, patch_bias=False).resolve(1)
    assert changed_keys(other, manifest) == ["model.patch_bias True -> False", "model.class_tokens 1 -> 2"]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_never_and_must(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.resume is must, and there is no checkpoint"):
        run(config_of(tmp_path), resume="must")
    config = stopped_at(tmp_path, 4)
    before = contents(tmp_path)
    run(config, resume="never")
    assert [line["step"] for line in lines(tmp_path, "train")] == [3, 6, 9]
    aside = contents(tmp_path / "earlier/1")
    assert {name: aside.get(name) for name in before if not name.startswith("earlier")} == before
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000009"]


def test_a_run_that_is_complete_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, checkpoint=CheckpointConfig(save_interval=3, keep=2))
    run(config)
    before = contents(tmp_path)
    capsys.readouterr()
    run(config)
    assert "nothing is left" in said(capsys)[0]
    after = contents(tmp_path)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {"config.yaml"}
    with pytest.raises(ConfigError, match=r"train\.steps is 7, and .*step 9 already"):
        run(replace(config, train=replace(config.train, steps=7)))
