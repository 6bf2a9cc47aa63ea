"""Requests to stop, with real ranks: all end with code 3 after the same step, with a checkpoint of it and all lines."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from engine.config import TrainConfig
from engine.run.stopping import StopRequests
from parallel import parent
from tests.engine.run.forked import checkpoints, long_run, running, steps_told

STOPS = {
    # name: ranks, signals and to whom (nobody: all), changes, reason that is told
    "one rank": (4, [(signal.SIGUSR1, (2,))], {"parallel__tensor_parallel_size": "2"}, r"SIGUSR1 to rank 2"),
    "all ranks": (4, [(signal.SIGTERM, ())], {"parallel__zero_stage": "3"}, r"SIGTERM to rank \d( and \d more)?"),
    "different ones": (
        2,
        [(signal.SIGUSR1, ()), (signal.SIGTERM, ()), (signal.SIGINT, (1,))],
        {"parallel__pipeline_parallel_size": "2", "checkpoint__async_save": "true", "checkpoint__save_interval": "2"},
        r"SIG\w+ to rank \d( and 1 more)?",
    ),
    "twice within a second": (2, [(signal.SIGINT, ()), (signal.SIGINT, ())], {}, r"SIGINT to rank \d( and 1 more)?"),
    "with data workers": (2, [(signal.SIGTERM, (1,))], {"data__workers": "2"}, r"SIGTERM to rank 1"),
    "alone": (1, [(signal.SIGUSR1, ())], {}, r"SIGUSR1 to rank 0"),
    "by step": (2, [], {"train__stop_step": "5"}, r"train.stop_step 5"),
    "by time": (2, [], {"train__time_limit": "0.03"}, r"train.time_limit"),
    "traced": (2, [(signal.SIGTERM, (0,))], {"log__profile_steps": "[3,99999]"}, r"SIGTERM to rank 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_all_ranks_stop_at_one_step_and_can_go_on(name: str, tmp_path: Path) -> None:
    size, signals, changes, reason = STOPS[name]
    run_dir = tmp_path / "run"
    with running(tmp_path, size, long_run(run_dir, **changes)) as run:
        if signals:
            run.wait_for(5)
        for number, ranks in signals:
            run.kill(number, *ranks)
        codes, said, last = run.codes(), run.said(), run.said(0).splitlines()[-1]
    told = steps_told(run_dir)
    assert codes == [3] * size, said
    assert told == list(range(1, len(told) + 1))
    assert checkpoints(run_dir)[-1] == f"step-{told[-1]:08d}" and not any("." in c for c in checkpoints(run_dir))
    assert re.fullmatch(rf"stopped after step {told[-1]} of 100000 \({reason}\): .*goes on from there", last), said
    assert said.count("stopped after") == 1 and "rror" not in said
    if "log__profile_steps" in changes:
        assert len(list((run_dir / "profile").iterdir())) == size + 1, "a trace of each rank, and the timeline"


SLOW = """
from engine.run.step import Stepper
import pathlib, time
def step(self, *args, step=Stepper.train_step):
    if self.assembly.optimizer.steps == 5:
        pathlib.Path(folder, f"slow{rank}").touch()
        time.sleep(600)
    return step(self, *args)
Stepper.train_step = step
"""


@pytest.mark.slow
def test_the_second_time_it_is_at_once(tmp_path: Path) -> None:
    with running(tmp_path, 2, long_run(tmp_path / "run"), planted=SLOW) as run:
        run.wait_for(5)
        while len(list(tmp_path.glob("slow*"))) < 2:
            time.sleep(0.02)
        run.kill(signal.SIGINT)
        time.sleep(1.2)
        assert all(rank.is_alive() for rank in run.ranks)
        run.kill(signal.SIGINT)
        assert run.codes() == [130] * 2
        assert "prog: interrupted\n" in run.said()
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.slow
def test_what_was_ignored_from_the_start_stays_so(tmp_path: Path) -> None:
    """As under nohup, or for a shell's background job."""
    ignored = [signal.SIGINT, signal.SIGUSR1]
    with running(tmp_path, 1, long_run(tmp_path / "run"), ignored=ignored) as run:
        step = run.wait_for(5)
        for number in ignored:
            run.kill(number)
        run.wait_for(step + 10)
        run.kill(signal.SIGTERM)
        assert run.codes() == [3]


def test_a_warning_waits_for_a_run_that_begins_and_is_let_go_after_it() -> None:
    before, handler = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGUSR1)
    try:
        parent.hold_warnings()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # pytest's other threads hold nothing
        with StopRequests(TrainConfig(), 0, time.monotonic()) as requests:
            assert requests.vote() == 1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGUSR1, handler)
