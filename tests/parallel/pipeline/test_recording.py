"""What a recorder makes of what it hears, by a clock that the test turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.comm import Axis, CommMeter, watched
from parallel.pipeline import Action
from parallel.pipeline.recording import CudaClock, Recorder, Slice, bubble_share, own_figures

AXIS = Axis(name="pipeline", ranks=(0,), index=0)


class Turned:
    """A clock that goes on by what it is told."""

    def __init__(self) -> None:
        self.now = 0

    def start(self) -> None: ...
    def settle(self) -> None: ...
    def stamp(self) -> int:
        return self.now

    def nanoseconds(self, stamp: int) -> int:
        return stamp


@pytest.fixture
def parts() -> tuple[Recorder, Turned, CommMeter]:
    recorder, clock, meter = Recorder(torch.device("cpu")), Turned(), CommMeter()
    recorder.clock, recorder.stamp = clock, clock.stamp
    meter.where.listener = recorder
    return recorder, clock, meter


def _pass(clock: Turned, meter: CommMeter) -> None:
    """F of 100 ns with 30 of waiting before it, 20 of reading and 10 of a collective within it; a send; I; W."""
    where = meter.where
    axis = Axis(name="pipeline", ranks=(0,), index=0, meter=meter)

    def call(kind: str, seconds: int, tensor: Any = None, **more: bool) -> None:
        with watched(axis, kind, tensor, **more):
            clock.now += seconds

    where.now(Action.parse("1RECV_F0"))
    call("recv", 5, torch.zeros(3))
    where.now(Action.parse("1F0"))
    call("recv", 30)
    where.arrived()
    with where.during("reading images"):
        clock.now += 20
    call("all_reduce", 10, torch.zeros(4))
    clock.now += 40
    where.now(Action.parse("1SEND_F0"))
    call("send", 7, torch.zeros(2, dtype=torch.float64))
    call("recv", 0, starts=True)
    call("send", 3)
    where.now(Action.parse("1I0"))
    clock.now += 50
    where.now(Action.parse("1W0"))
    call("wait for nobody", 1)
    call("recv", 39, starts=True)
    where.now("waiting for an action to be ready")
    call("recv", 500)
    where.now("finishing gradients")
    clock.now += 1000


def test_a_pass_is_timed_without_waits_for_messages(parts: tuple[Recorder, Turned, CommMeter]) -> None:
    recorder, clock, meter = parts
    for _ in range(2):  # the earlier pass is forgotten
        recorder.begin_pass()
        _pass(clock, meter)
    busy, start, end = recorder.busy()
    assert busy == pytest.approx(1e-9 * (70 + 50 + 40))
    assert end - start == pytest.approx(1e-9 * (70 + 10 + 50 + 40)), "the pass ends with its last action"
    assert not recorder.is_recording


def test_a_step_is_recorded(parts: tuple[Recorder, Turned, CommMeter]) -> None:
    recorder, clock, meter = parts
    recorder.begin_step(7, room=1)
    recorder.begin_pass()
    _pass(clock, meter)
    record = recorder.end_step()
    assert record.computed == [Slice(Action.parse(a), *at) for a, at in (
        ("1F0", (35, 105)), ("1I0", (115, 165)), ("1W0", (165, 205)))]  # fmt: skip
    assert record.messages == [
        Slice(Action.parse("1RECV_F0"), 0, 5), Slice(Action.parse("1SEND_F0"), 105, 115)
    ]  # fmt: skip
    assert record.waits == [
        Slice(Action.parse("1F0"), 5, 35),
        Slice(Action.parse("1SEND_F0"), 112, 115),
    ]
    assert record.phases == [
        Slice("reading images", 35, 55),
        Slice("waiting for an action to be ready", 205, 705),
        Slice("finishing gradients", 705, 1705),
    ]
    assert record.calls == [Slice("all_reduce", 55, 65, 16, "pipeline")]
    assert (record.step, record.missing, len(record)) == (7, 1, 11)
    assert not recorder.is_recording


def test_nobody_listens_unasked(parts: tuple[Recorder, Turned, CommMeter]) -> None:
    recorder, clock, meter = parts
    meter.where.listener = None
    _pass(clock, meter)
    assert recorder.computed == []


def test_the_share_is_of_all_pipelines_together() -> None:
    first = [[1.0, 0.0, 2.0], [1.0, 1.0, 3.0]]  # two ranks of a pipeline that takes 3 s, busy for 1 s each
    second = [[4.0, 10.0, 14.0], [4.0, 10.5, 15.0]]  # 5 s, busy for 4 s each, at another time
    figures = torch.tensor(list(zip(first, second, strict=True)), dtype=torch.float64)
    assert bubble_share(figures) == pytest.approx(1 - 10 / (2 * 3 + 2 * 5))
    assert bubble_share(torch.zeros(2, 1, 3)) == 0.0
    assert [sum(x) for x in zip(own_figures([1, 2], 0, 3), own_figures([5, 6], 2, 3), strict=True)] == [
        1, 2, 0, 0, 5, 6,
    ]  # fmt: skip


def test_events_of_a_gpu_are_timed_from_one_that_the_host_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(now=3.0)  # milliseconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = gpu.now

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("time.perf_counter_ns", lambda: 1_000)
    clock = CudaClock()
    clock.start()
    gpu.now += 0.25
    assert clock.nanoseconds(clock.stamp()) == 1_000 + 250_000


@pytest.mark.gpu
def test_a_gpu_s_actions_take_the_time_of_the_gpu() -> None:
    recorder, meter = Recorder(torch.device("cuda")), CommMeter()
    x = torch.randn(4096, 4096, device="cuda")
    meter.where.listener = recorder
    recorder.begin_step(1, room=10)
    recorder.begin_pass()
    for m in range(3):
        meter.where.now(Action.parse(f"0F{m}"))
        for _ in range(10):
            x @ x
    meter.where.now("optimizer")
    record = recorder.end_step()
    times = [s.end - s.start for s in record.computed]
    assert len(times) == 3 and min(times) > 100_000, "ten products of 4096 x 4096 take a GPU longer than 0.1 ms"
    assert recorder.busy()[0] == pytest.approx(sum(times) / 1e9, rel=0.01)
