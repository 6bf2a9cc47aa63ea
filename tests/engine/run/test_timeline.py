"""The timeline of a run with real ranks, and the bubble that the same run tells of itself."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from data import DataConfig
from engine.config import LogConfig, TrainConfig
from engine.config.contrastive import ContrastiveConfig
from engine.errors import OutputError
from engine.run.profile import TimelineRecording
from engine.run.timeline import merge, part_of, ranks_shown
from engine.run.trace_events import SIMULATED
from engine.run.trainer import pretrain
from parallel.grid import GridShape
from parallel.pipeline import Action, Schedule
from parallel.pipeline.graph import input_receive
from parallel.process_group import World
from tests.engine.run.forked import running
from tests.engine.small import flags, small

RANKS, STEPS, MICRO_BATCHES = 4, (2, 4), 5
Event = dict[str, Any]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two pipelines of two ranks."""
    folder = tmp_path_factory.mktemp("timeline")
    given = {"parallel__pipeline_parallel_size": "2", "parallel__tensor_parallel_size": "2", "train__steps": "5"}
    given |= {"log__profile_steps": f"[{STEPS[0]},{STEPS[1]}]", "log__interval": "1", "run_dir": str(folder / "run")}
    given |= {"train__global_batch_size": "10", "train__micro_batch_size": "2", "checkpoint__save_interval": "null"}
    with running(folder, RANKS, flags(**given)) as run:
        assert run.codes() == [0] * RANKS, run.said()
        assert f"timeline    {folder / 'run' / 'profile' / 'timeline.json'}: steps 2 to 4, bubble" in run.said(0)
    return folder / "run"


@pytest.fixture(scope="module")
def trace(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "profile" / "timeline.json").read_text())


def _schedule(trace: dict[str, Any]) -> Schedule:
    told = trace["otherData"]["schedule"]
    return Schedule.from_text(told["text"], stage_to_rank=told["stage_to_rank"])


def _slices(trace: dict[str, Any], category: str) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] == category]


def test_each_action_is_there_once_per_step_measured_and_simulated(trace: dict[str, Any]) -> None:
    schedule, expected, simulated = _schedule(trace), Counter[tuple[int, int, str]](), Counter[tuple[int, int, str]]()
    for step in range(STEPS[0], STEPS[1] + 1):
        for rank in range(RANKS):
            expected.update((step, rank, str(a)) for a in schedule.ranks[rank // 2] if a.kind.is_compute)
        for rank, program in enumerate(schedule.ranks):
            simulated.update((step, SIMULATED + rank, str(a)) for a in program if a.kind.is_compute)
    for category, counts in (("compute", expected), ("simulated", simulated)):
        found = Counter((e["args"]["step"], e["pid"], e["name"]) for e in _slices(trace, category))
        assert found == counts and counts.total() > 0
    first = _slices(trace, "compute")[0]["args"]
    assert {"action", "stage", "micro_batch", "step"} <= set(first)
    messages = _slices(trace, "message")
    assert Counter((e["args"]["step"], e["pid"], e["name"]) for e in messages) == Counter(
        (step, rank, str(a))
        for step in range(STEPS[0], STEPS[1] + 1)
        for rank in range(RANKS)
        for a in schedule.ranks[rank // 2]
        if a.kind.is_message
    )
    sizes = {e["args"]["bytes"] for e in messages}
    assert len(sizes) == 1 and min(sizes) > 0, "both ends of all messages know what they carry"


def test_time_begins_with_what_is_first_on_any_rank(trace: dict[str, Any]) -> None:
    assert min(event["ts"] for event in trace["traceEvents"] if event["ph"] != "M") == 0


def test_slices_of_a_lane_nest(trace: dict[str, Any]) -> None:
    lanes = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["name"], event["cat"]))
    for lane in lanes.values():
        open_: list[tuple[float, str, str]] = []
        for start, negative, name, category in sorted(lane):
            open_ = [outer for outer in open_ if outer[0] > start]
            assert all(start - negative <= end for end, *_ in open_), (name, open_)
            assert category not in ("compute", "simulated") or not open_, (name, open_)
            open_.append((start - negative, name, category))
    names = {(e["pid"], e["args"]["name"]) for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert (3, "rank 3: pipeline 1, data 0, context 0, tensor 1") in names
    assert (SIMULATED + 1, "simulated rank 1") in names


def test_what_is_read_was_computed_and_sent_before(trace: dict[str, Any]) -> None:
    schedule = _schedule(trace)
    at = {(e["args"]["step"], e["pid"], e["name"]): e for e in _slices(trace, "compute")}
    sent = {(e["args"]["step"], e["pid"], e["name"]): e["ts"] for e in _slices(trace, "message")}
    arrows: dict[int, dict[str, Event]] = defaultdict(dict)
    for event in trace["traceEvents"]:
        if event["ph"] in "sf" and event.get("cat") == "message":
            assert event["ph"] not in arrows[event["id"]], "numbers of messages are their own"
            arrows[event["id"]][event["ph"]] = event
    for (step, rank, name), event in at.items():
        action = Action.parse(name)
        if action.kind.value == "B":
            forward = at[step, rank, f"{action.stage}F{action.micro_batch}"]
            assert forward["ts"] + forward["dur"] <= event["ts"]
        receive = input_receive(action, schedule)
        if receive is not None:
            sender = schedule.peer(receive) * 2 + rank % 2
            assert sent[step, sender, str(receive.counterpart)] <= event["ts"]
    steps = STEPS[1] - STEPS[0] + 1
    assert len(arrows) == steps * 2 * 2 * MICRO_BATCHES
    assert all(ends["s"]["ts"] < ends["f"]["ts"] for ends in arrows.values())
    assert all(ends["s"]["pid"] % 2 == ends["f"]["pid"] % 2 for ends in arrows.values())


def test_the_bubble_of_the_metrics_is_that_of_the_timeline(run_dir: Path, trace: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line["bubble"] for line in lines if line["event"] == "train"}
    assert all(0 < bubble < 1 for bubble in told.values()) and len(told) == 5
    for step in range(STEPS[0], STEPS[1] + 1):
        busy = total = 0.0
        for tensor in (0, 1):
            own = [e for e in _slices(trace, "compute") if e["args"]["step"] == step and e["pid"] % 2 == tensor]
            busy += sum(e["dur"] for e in own)
            total += 2 * (max(e["ts"] + e["dur"] for e in own) - min(e["ts"] for e in own))
        assert told[step] == pytest.approx(1 - busy / total, abs=1e-4)
        assert trace["otherData"]["bubble"][str(step)] == pytest.approx(told[step], abs=1e-4)
    predicted = {line["bubble_predicted"] for line in lines if line["event"] == "train"}
    assert len(predicted) == 1 and 0 < min(predicted) < 1


def test_phases_and_collectives_are_told_apart(trace: dict[str, Any]) -> None:
    phases = {(e["pid"], e["name"]) for e in _slices(trace, "phase")}
    for rank in range(RANKS):
        assert {(rank, "finishing gradients"), (rank, "adding up loss and norm"), (rank, "optimizer")} <= phases
    assert any(name.startswith("reading images") for _, name in phases)
    calls = {e["args"]["axis"] for e in _slices(trace, "collective")}
    assert {"tensor", "pipeline+data+context+tensor"} <= calls
    assert trace["otherData"]["steps_slowed_by_torch_profiler"] == [2]


def test_parts_of_other_hosts_may_be_missing(tmp_path: Path) -> None:
    schedule = Schedule.from_text("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0")
    told = {
        "name": "1f1b",
        "policy": "static",
        "forward_passes": 0,
        "num_stages": 2,
        "stage_to_rank": [0, 1],
        "text": str(schedule),
    }
    header = {"rank": 0, "grid": {"pipeline": 2}, "replicas": 1, "steps": [7], "traced": [7], "clock_error": 0}
    compute = {"ph": "X", "cat": "compute", "pid": 0, "tid": 1}
    events = [
        {**compute, "name": f"0{what}0", "ts": start, "dur": 2.0, "args": {"step": 7, "action": f"0{what}0"}}
        for what, start in (("F", 0.0), ("B", 6.0))
    ]
    lines = [{**header, "missing": 3, "schedule": told}, *events]
    part_of(tmp_path, 0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = merge([part_of(tmp_path, 0)], tmp_path / "timeline.json")
    assert summary["bubble"] == {"7": pytest.approx(0.5)} and summary["not_recorded"] == {"0": 3}
    merged = json.loads((tmp_path / "timeline.json").read_text())
    assert merged["traceEvents"][:2] == events and merged["otherData"]["ranks"] == [0]


def _alone(folder: Path, steps: int) -> None:
    train = TrainConfig(steps=steps, global_batch_size=8)
    log = LogConfig(interval=1, tensorboard=False, profile_steps=(1, steps))
    pretrain(small(run_dir=str(folder), train=train, log=log), World())


def test_a_step_of_two_passes_is_simulated_with_both(tmp_path: Path) -> None:
    config = small(
        objective="contrastive", contrastive=ContrastiveConfig(pairs="views", passes=2), num_classes=0,
        data=DataConfig(kind="synthetic", size=32, views=2), run_dir=str(tmp_path), log=LogConfig(profile_steps=(1, 1)),
        train=TrainConfig(steps=1, global_batch_size=8, micro_batch_size=2),
    )  # fmt: skip
    pretrain(config, World())
    trace = json.loads((tmp_path / "profile" / "timeline.json").read_text())
    measured, simulated = (sorted(e["name"] for e in _slices(trace, of)) for of in ("compute", "simulated"))
    assert simulated == measured == sorted([f"0F{m}" for m in range(4)] * 2 + [f"0B{m}" for m in range(4)])


def test_what_would_be_too_much_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.run.profile.room_of", lambda shape: 20)  # a step has some seven slices
    before = TimelineRecording.before
    late = lambda *given, **named: (time.sleep(0.5), before(*given, **named))[1]  # noqa: E731
    monkeypatch.setattr(TimelineRecording, "before", late)
    _alone(tmp_path, 6)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    times = [line["step_time"] for line in lines if line["event"] == "train"]
    assert sorted(times)[3] < 0.5, "recording is no part of a step's time"
    kept = json.loads((tmp_path / "profile" / "timeline.json").read_text())["otherData"]["steps"]
    assert kept == list(range(1, len(kept) + 1)) and 1 < len(kept) < 6
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("timeline"))
    assert f": steps 1 to {len(kept)}; {6 - len(kept)} more left out" in told and "bubble" not in told
    shape = GridShape(pipeline=16, data=64)
    shown = ranks_shown(shape)
    assert len(shown) == 128 and {rank // 64 for rank in shown} == set(range(16)), "whole pipelines"
    assert {rank % 64 for rank in shown} == set(range(8)) and len(ranks_shown(GridShape(pipeline=256, tensor=2))) == 256


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("engine.run.profile.write_part", full)
    with pytest.raises(OutputError, match=r"timeline.json cannot be written: .*No space left"):
        _alone(tmp_path, 1)
