"""What a run writes: metrics.jsonl, TensorBoard events, and the console line."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from engine.run.metrics import MetricsWriter

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
    found = lines(tmp_path)
    assert all(abs(time.time() - line.pop("wall_time")) < 600 for line in found)
    assert found == [{"event": "train", "step": 10} | TRAIN, {"event": "eval", "step": 10} | EVALUATION]
    w.close()
    assert not list(tmp_path.glob("events*"))


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    w = writer(tmp_path, tensorboard=False)
    w.train(10, TRAIN | {"loss": float("nan"), "grad_norm": float("inf")})
    w.close()
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[0]["grad_norm"] is None


def test_the_console_line_is_in_the_order_that_megatron_users_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = writer(tmp_path, tensorboard=False)
    w.train(10, TRAIN | {"skipped_steps": 0})
    w.train(20, TRAIN | {"loss_scale": 65536.0})
    w.evaluation(20, EVALUATION | {"eval_time": 1.0})
    w.evaluation(20, {"loss": 2.0, "ema_loss": 1.5, "ema_accuracy": 0.98})
    w.close()
    plain, scaled, evaluation, averaged = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\]", plain[:10])
    assert plain[11:] == (
        "step 10/40 | samples  640 |  250.0 ms |  256.0 img/s | lr 1.00E-03 | loss 2.25    | norm 0.500"
    )
    assert scaled.endswith("| loss 2.25    | scale 65536 | norm 0.500 | skipped 1")
    assert evaluation[11:] == "evaluation at step 20 | loss 2 | accuracy 97.50 % | images 360"
    assert averaged[11:] == "evaluation at step 20 | loss 2 | EMA loss 1.5 | EMA accuracy 98.00 %"


def test_console_lines_fit_110_columns_whatever_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = MetricsWriter(tmp_path, steps=10**6, global_batch_size=65536, tensorboard=False)
    large = {"samples": 10**11, "step_time": 99.9, "images_per_second": 123456.7, "loss": 1.2345e-5, "grad_norm": 1e4}
    w.train(10**6, TRAIN | large | {"loss_scale": 2.0**24, "skipped_steps": 123})
    w.evaluation(10**6, EVALUATION | {"loss": 1.2345e-5, "ema_loss": 1.2345e-5, "ema_accuracy": 0.98})
    w.close()
    train, evaluation = capsys.readouterr().out.splitlines()
    assert len(train) <= 110 and len(evaluation) <= 110
    assert all(part in train for part in ("step 1000000/1000000", "loss 1.234e-05", "norm 10000.000", "skipped 123"))


@pytest.mark.parametrize("columns", [80, 110])
def test_on_a_terminal_lines_fit_it_and_the_bar_shows_the_loss(
    tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    with os.fdopen(terminal, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "__stdout__", out)  # whose size shutil asks for
        w = writer(tmp_path, tensorboard=False)
        w.say("word " * 40)
        w.advance(1.2345)
        w.train(10, TRAIN)
        w.evaluation(10, EVALUATION)
        w.close()
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert all(len(line) <= columns for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", shown)))
    assert "loss=" not in shown and re.search(r"1/40 \[.*loss 1\.23", shown)
    assert "loss 2.25" in shown and "accuracy 97.50 %" in shown


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


def test_tensorboard_shows_the_configuration_and_compares_runs_by_its_keys(tmp_path: Path) -> None:
    w = writer(tmp_path)
    w.describe("# ranks: 1\nseed: 7\n", {"train.seed": 7, "model.attention": ("full", "window"), "model.preset": None})
    w.train(10, TRAIN)
    w.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    page = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 7\n" in page and page.startswith("```")
    shown = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    keys = HParamsPluginData.FromString(shown).session_start_info.hparams
    assert keys["train.seed"].number_value == 7 and keys["model.attention"].string_value == "('full', 'window')"
