"""A run that goes on from a checkpoint goes on in its files, without gaps, doubles or what was lost."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from engine.config import Config, LogConfig, TrainConfig
from engine.config.cli import parse
from engine.errors import OutputError
from engine.run.journal import Journal
from engine.run.metrics import MetricsWriter
from engine.run.profile import StepProfiler
from engine.run.rewind import rewind, whole_lines, whole_records
from engine.run.run_dir import RunDir, prepare_run_dir, set_aside
from engine.run.trainer import _begin
from parallel.comm import single_axis
from parallel.grid import GridShape
from tests.engine.run.test_metrics import EVALUATION, TRAIN
from tests.engine.small import small

STEPS = (1, 2, 2, 4)  # in the files that are cut
LINES = [json.dumps({"event": "train", "step": step, "culprit": "é\n"}).encode() + b"\n" for step in STEPS]


def records() -> list[bytes]:
    """As TensorBoard writes them: the version, then an event of each step."""
    made = []
    for event in (Event(file_version="brain.Event:2"), *(Event(step=step, wall_time=1.5) for step in STEPS)):
        file = io.BytesIO()
        RecordWriter(file).write(event.SerializeToString())
        made.append(file.getvalue())
    return made


# -- cutting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 9])
def test_lines_are_cut_to_whole_ones_wherever_the_writing_ended(tmp_path: Path, step: int) -> None:
    path, whole = tmp_path / "metrics.jsonl", b"".join(LINES)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept, more = rewind(path, whole_lines, step)
        count = sum(len(b"".join(LINES[: i + 1])) <= size for i in range(len(LINES)))
        expected = [(line, at) for line, at in zip(LINES[:count], STEPS, strict=False) if at <= step]
        assert path.read_bytes() == b"".join(line for line, _ in expected)
        assert kept == (path.stat().st_size, max((at for _, at in expected), default=0)) and more == size - kept.size


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 9])
def test_records_are_cut_to_whole_ones_wherever_the_writing_ended_or_a_byte_is_wrong(tmp_path: Path, step: int) -> None:
    path, made = tmp_path / "events", records()
    whole = b"".join(made)
    ends = [len(b"".join(made[: i + 1])) for i in range(len(made))]

    def expected(sound: int) -> bytes:
        count = sum(end <= sound and at <= step for end, at in zip(ends, (0, *STEPS), strict=True))
        return b"".join(made[:count]) if count > 1 else b""

    for at in range(len(whole) + 1):
        path.write_bytes(whole[:at])
        rewind(path, whole_records, step)
        assert path.read_bytes() == expected(at)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        rewind(path, whole_records, step)
        assert path.read_bytes() == expected(at)


@pytest.mark.parametrize(
    "tail", [b"\0" * 50, b"[1]\n", b'{"step": "2"}\n', b'{"step": true}\n', b"\xff\n", b"[" * 9**5 + b"\n"]
)
def test_what_is_no_line_of_ours_is_cut_at_the_end_and_kept_between_lines(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] + tail)
    assert rewind(path, whole_lines, 9)[0].step == 1 and path.read_bytes() == LINES[0]
    if tail.endswith(b"\n"):
        path.write_bytes(LINES[0] + tail + LINES[1])
        assert rewind(path, whole_lines, 9)[1] == 0


def test_large_files_are_cut_in_little_memory(tmp_path: Path) -> None:
    lines, events = tmp_path / "metrics.jsonl", tmp_path / "events"
    lines.write_bytes(b"".join(LINES))
    events.write_bytes(b"".join(records()))
    sizes = [path.stat().st_size for path in (lines, events)]
    for path in (lines, events):
        os.truncate(path, 1 << 28)  # zeros, as a power cut may leave
    tracemalloc.start()
    rewind(lines, whole_lines, 9)
    rewind(events, whole_records, 9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [path.stat().st_size for path in (lines, events)] == sizes and peak < 1 << 24


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_neither_cut_nor_gone_on_with(tmp_path: Path, kind: str) -> None:
    path, precious = tmp_path / "log", tmp_path / "precious"
    precious.write_bytes(b"kept")
    {"link": lambda: path.symlink_to(precious), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(OutputError):
        rewind(path, whole_lines, 0)
    with pytest.raises(OutputError, match="cannot be gone on with"):
        Journal(path, print, goes_on=True)
    assert precious.read_bytes() == b"kept"


# -- metrics.jsonl and TensorBoard -------------------------------------------------------------------------------------


def attempt(folder: Path, resumed_at: int | None, last: int) -> None:
    """One that writes a line every 10 steps until it is lost, which closes nothing."""
    run = RunDir(prepare_run_dir(str(folder)), single_axis("world"))
    if resumed_at is not None:
        run.go_on(resumed_at)
    writer = MetricsWriter(folder, steps=80, global_batch_size=64, tensorboard=True, resumed_at=resumed_at)
    writer.describe("seed: 7\n", {"train.seed": 7})
    for step in range((resumed_at or 0) // 10 * 10 + 10, last + 1, 10):
        writer.train(step, TRAIN | {"loss": 1 / step})
    writer.evaluation(last, EVALUATION)
    writer.sync()
    run.close()


def half_written(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 7)


@pytest.mark.parametrize("resumed_at", [20, 35, 60, 0])
def test_metrics_and_curves_go_on_without_gaps_or_doubles(tmp_path: Path, resumed_at: int) -> None:
    attempt(tmp_path, None, 60)
    events, metrics = next(tmp_path.glob("events*")), tmp_path / "metrics.jsonl"
    before = metrics.read_bytes()
    if resumed_at < 60:
        half_written(events)
        half_written(metrics)
    attempt(tmp_path, resumed_at, 80)
    steps = list(range(10, 81, 10))
    evaluated = [60, 80] if resumed_at == 60 else [80]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == steps
    assert [line["step"] for line in lines if line["event"] == "eval"] == evaluated
    kept = [line for line in before.splitlines(keepends=True) if json.loads(line)["step"] <= resumed_at]
    assert metrics.read_bytes().startswith(b"".join(kept))
    assert list(tmp_path.glob("events*")) == [events]
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("train/loss")] == [(s, pytest.approx(1 / s)) for s in steps]
    assert [e.step for e in seen.Scalars("eval/loss")] == evaluated
    tags = [value.tag for event in EventFileLoader(str(events)).Load() for value in event.summary.value]
    assert tags.count("config/text_summary") == tags.count("_hparams_/session_start_info") == 1


def test_files_that_are_missing_begin_anew_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(tmp_path, 20, 40)
    said = [line for line in capsys.readouterr().out.splitlines() if "begins here" in line]
    assert len(said) == 2 and "metrics.jsonl" in said[0] and "tfevents" in said[1]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [30, 40, 40]
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in seen.Scalars("train/loss")] == [30, 40] and seen.Tensors("config/text_summary")


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path, steps=40, global_batch_size=64, tensorboard=True)
    writer.train(10, TRAIN)
    synced, fsync = dict[int, int](), os.fsync

    def watch(file: int) -> None:
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", watch)
    writer.sync()
    files = (tmp_path / "metrics.jsonl", next(tmp_path.glob("events*")))
    assert synced == {path.stat().st_ino: path.stat().st_size for path in files}
    writer.close()


# -- the folder --------------------------------------------------------------------------------------------------------


def begin(folder: Path, resumed_at: int | None, seed: int = 0, traced: tuple[int, int] | None = None) -> Config:
    """What rank 0 does before the first step, and an end."""
    train = TrainConfig(steps=80, global_batch_size=8, seed=seed)
    log = LogConfig(tensorboard=True, profile_steps=traced)
    config = small(train=train, log=log, run_dir=str(folder)).resolve(1)
    run = RunDir(prepare_run_dir(str(folder)), single_axis("world"))
    shape = GridShape(pipeline=1, data=1, context=1, tensor=1)
    writer = _begin(run, config, 80, shape, config.to_yaml(), resumed_at=resumed_at)
    run.write_classes('["cat"]\n', writer.say)
    for step in range((resumed_at or 0) + 10, 81, 10):
        writer.train(step, TRAIN)
    writer.close()
    run.close()
    return config


def test_pictures_of_lost_steps_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    folder = tmp_path / "attention"
    folder.mkdir()
    for step in (4, 9):
        (folder / f"step-{step:08d}.png").touch()
    run = RunDir(prepare_run_dir(str(tmp_path)), single_axis("world"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(OutputError, match=r"step-00000009\.png cannot be removed: Permission denied"):
            run.go_on(5)
    run.go_on(5)
    run.close()
    assert [path.name for path in folder.iterdir()] == ["step-00000004.png"]


def test_a_run_that_goes_on_keeps_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, None)
    (tmp_path / "checkpoints" / "step-20").mkdir(parents=True)
    (tmp_path / ".config.yaml.new").write_text("half")  # of a start that was killed
    names = {path.name for path in tmp_path.iterdir()} - {".config.yaml.new"}
    classes = (tmp_path / "classes.json").stat()
    config = begin(tmp_path, 20)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert os.path.samestat(classes, (tmp_path / "classes.json").stat())
    text = (tmp_path / "config.yaml").read_text()
    assert "\n# resumed: after step 20\n" in text and parse(["--config", str(tmp_path / "config.yaml")])[0] == config
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [*range(10, 81, 10)]
    assert "metrics.jsonl goes on after its line of step 20; " in capsys.readouterr().out


def test_another_configuration_is_in_force_and_the_earlier_kept(tmp_path: Path) -> None:
    begin(tmp_path, None, seed=1)
    begin(tmp_path, 20, seed=2)
    begin(tmp_path, 30, seed=2)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["seed"] == 2
    assert [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "earlier").rglob("*.*")] == [
        "earlier/1/config.yaml"
    ]
    assert yaml.safe_load((tmp_path / "earlier/1/config.yaml").read_text())["train"]["seed"] == 1


def test_traces_are_kept(tmp_path: Path) -> None:
    begin(tmp_path, None, traced=(30, 40))
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank0.json").write_text("{}")
    begin(tmp_path, 40, traced=(30, 40))  # which traces nothing
    assert (tmp_path / "profile" / "rank0.json").exists()
    begin(tmp_path, 35, traced=(30, 40))
    assert (tmp_path / "earlier" / "1" / "profile" / "rank0.json").exists() and not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("first", "traced"), [(1, True), (3, True), (4, False)])
def test_steps_that_are_left_are_traced(tmp_path: Path, first: int, traced: bool) -> None:
    profiler = StepProfiler((2, 3), tmp_path, 0)
    for step in range(first, 6):
        profiler.before(step)
        profiler.after(step)
    assert profiler.path.exists() == traced


def test_what_is_no_file_is_moved_where_a_run_goes_on(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"".join(LINES))
    (run := tmp_path / "run").mkdir()
    (run / "metrics.jsonl").symlink_to(precious)
    (run / "config.yaml").symlink_to(tmp_path / "nowhere")
    os.mkfifo(run / "events.out.tfevents.9[x]")
    begin(run, 2)
    assert precious.read_bytes() == b"".join(LINES) and not (tmp_path / "nowhere").exists()
    moved = {path.name for path in (run / "earlier" / "1").iterdir()}
    assert moved == {"metrics.jsonl", "config.yaml", "events.out.tfevents.9[x]"}
    assert (run / "metrics.jsonl").is_file() and not (run / "metrics.jsonl").is_symlink()


def test_a_new_run_sets_checkpoints_aside_in_any_folder(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "missing", ("step-*",)) is None
    (tmp_path / "checkpoints").mkdir()
    assert set_aside(tmp_path) is None  # made for this run
    kept: dict[str, Any] = {}
    for number in (1, 2):
        (tmp_path / "checkpoints" / f"step-{number}").mkdir()
        (tmp_path / "checkpoints" / f"step-{number}" / "manifest.json").write_text("{}")
        (tmp_path / "checkpoints" / "notes").write_text("the user's")
        kept[f"earlier/{number}/step-{number}"] = set_aside(tmp_path / "checkpoints", ("step-*",))
    assert all((tmp_path / "checkpoints" / place / "manifest.json").exists() for place in kept)
    assert (tmp_path / "checkpoints" / "notes").exists()
    (tmp_path / "checkpoints" / "step-3").mkdir()
    (tmp_path / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    begin(tmp_path, None)
    assert (tmp_path / "earlier" / "1" / "checkpoints" / "step-3").exists()
    assert (tmp_path / "checkpoints" / "notes").exists()  # and the lock: the folder is this run's now
