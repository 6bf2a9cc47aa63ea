"""What a run writes: metrics.jsonl, TensorBoard events, and the console line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.metrics import MetricsWriter

TRAIN: dict[str, Any] = {
    "samples": 640,
    "loss": 2.25,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "loss_scale": 1.0,
    "skipped_steps": 1,
    "step_time": 0.25,
    "images_per_second": 256.0,
    "tokens_per_second": 4096.0,
    "tflops_per_device": 0.125,
    "mfu": None,
    "peak_memory": 2**30,
}
EVALUATION = {"loss": 2.0, "accuracy": 0.975, "images": 360}


def writer(folder: Path, tensorboard: bool = True) -> MetricsWriter:
    return MetricsWriter(folder, steps=40, global_batch_size=64, tensorboard=tensorboard)


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in text]


def test_each_line_is_one_json_object_with_everything_given(tmp_path: Path) -> None:
    w = writer(tmp_path, tensorboard=False)
    w.train(10, TRAIN)
    w.evaluation(10, EVALUATION)
    assert lines(tmp_path) == [{"event": "train", "step": 10} | TRAIN, {"event": "eval", "step": 10} | EVALUATION]
    w.close()
    assert not list(tmp_path.glob("events*"))


def test_a_run_that_starts_again_sets_the_lines_of_the_earlier_ones_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        w = writer(tmp_path, tensorboard=False)
        w.write("train", step, {})
        w.close()
    found = {path.name: json.loads(path.read_text())["step"] for path in tmp_path.glob("metrics*")}
    assert found == {"metrics.1.jsonl": 1, "metrics.2.jsonl": 2, "metrics.jsonl": 3}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    w = writer(tmp_path, tensorboard=False)
    w.train(10, TRAIN | {"loss": float("nan"), "grad_norm": float("inf")})
    w.close()
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[0]["grad_norm"] is None


def test_the_console_line_is_in_the_order_that_megatron_users_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = writer(tmp_path, tensorboard=False)
    w.train(10, TRAIN)
    w.evaluation(10, EVALUATION)
    w.close()
    train, evaluation = capsys.readouterr().out.splitlines()
    shown = [part.strip() for part in train.split("|")]
    assert shown[0].endswith("iteration       10/      40")
    assert [part.partition(":")[0] for part in shown[1:]] == [
        "consumed samples",
        "elapsed time per iteration (ms)",
        "images per second",
        "learning rate",
        "global batch size",
        "loss",
        "loss scale",
        "grad norm",
        "number of skipped iterations",
        "",
    ]
    assert "elapsed time per iteration (ms): 250.0 |" in train and "loss: 2.250000E+00 |" in train
    assert "accuracy: 97.50 % |" in evaluation and "images:      360 |" in evaluation


def test_tensorboard_events_hold_the_same_numbers_before_the_file_is_closed(tmp_path: Path) -> None:
    w = writer(tmp_path)
    w.train(10, TRAIN)
    w.train(20, TRAIN | {"loss": 1.5})
    w.evaluation(20, EVALUATION)
    events = EventAccumulator(str(tmp_path)).Reload()  # a rank that fails does not close its files
    numbers = {name for name, value in TRAIN.items() if value is not None}
    assert set(events.Tags()["scalars"]) == {f"train/{n}" for n in numbers} | {f"eval/{n}" for n in EVALUATION}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.25), (20, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/accuracy")] == [(20, pytest.approx(0.975))]
    w.close()
