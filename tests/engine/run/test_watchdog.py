"""Runs that hang: one message names rank, step and action, stacks are written, all ranks leave in time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.run.watchdog import _Still, verdict
from parallel.heartbeat import Attempt, Sign, Whereabouts
from tests.distributed import free_port
from tests.engine.small import flags

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.alone  # what is late, and what is only slow, is told apart by the clock
TIMEOUT = 5.0
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
SLEEP = "data.datasets.ArrayDataset.read = lambda *args: time.sleep(600)"
# ranks, the one at fault, what it does before its fourth step, flags
CASES: dict[str, tuple[int, int, str, dict[str, str]]] = {
    "reading": (2, 1, SLEEP, {}),
    "worker": (1, 0, "", {"data__workers": "1"}),
    "stopped": (3, 1, f"time.sleep(1); {STOP}", {"train__global_batch_size": "9", "parallel__shared_memory": "false"}),
    "store stopped": (2, 0, STOP, {}),
    "collective": (2, 1, "comm.barrier(self.assembly.grid.world)", {"parallel__pipeline_parallel_size": "2"}),
    "endless": (1, 0, "while True: pass", {}),
    "slow": (2, 1, f"time.sleep({TIMEOUT * 0.6})", {"train__steps": "6"}),
    "at work": (1, 0, f"until = time.time() + {TIMEOUT * 1.2}\nwhile time.time() < until: pass", {"train__steps": "4"}),
}
# One process imports torch; its children are the ranks, as a launcher starts them that leaves the store to rank 0.
SCRIPT = """
import json, os, pathlib, signal, sys, time
import data.datasets, pretrain_vit
from engine.run import watchdog
from engine.run.launch import run_rank
from engine.run.step import Stepper
from parallel import comm

train_step, read, ranks = Stepper.train_step, data.datasets.ArrayDataset.read, []
for name, (size, culprit, what, argv), port, folder in json.loads(sys.argv[1]):
    for rank in range(size):
        pid = os.fork()
        if pid:
            ranks.append((name, pid))
            continue
        steps = 0

        def step(self, *args):
            global steps
            steps += 1
            if rank == culprit and steps >= 4:
                if steps == 4:
                    pathlib.Path(folder, "when").write_text(str(time.time()))
                exec(what)
            return train_step(self, *args)

        def read_some(self, indices, crop=None):
            if 20 in indices:
                pathlib.Path(folder, "when").write_text(str(time.time()))
                time.sleep(600)
            return read(self, indices, crop)

        Stepper.train_step = step
        if name == "worker":
            data.datasets.ArrayDataset.read = read_some
        if name == "endless":
            watchdog._BUSY_FACTOR = 1
        os.dup2(os.open(folder + f"/error{rank}", os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.setsid()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv[0] = "prog"
        os._exit(run_rank(pretrain_vit.main, argv, "prog"))
deadline, ends = time.monotonic() + 60, {}
while len(ends) < len(ranks):
    for name, pid in ranks:
        if pid in ends:
            continue
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ends[pid] = (os.waitstatus_to_exitcode(status), time.time())
        elif time.monotonic() > deadline or (name == "store stopped" and len(ends) >= len(ranks) - 1):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.05)
left = [os.popen(f"ps -o pid= --sid {pid}").read().split() for _, pid in ranks]
print(json.dumps([[name, *ends[pid], pids] for (name, pid), pids in zip(ranks, left)]))
"""


@dataclass
class Ended:
    """How a case ended.

    Attributes:
        codes: of ranks. told: all that they said. left: processes that they left behind. seconds: from the fault until
            the last rank had left by itself. folder: of the run.
    """

    codes: list[int]
    told: str
    left: list[str]
    seconds: float
    folder: Path

    def stacks(self, rank: int) -> str:
        return (self.folder / "hang" / f"rank-{rank:05}.txt").read_text()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All cases at once."""
    folders = {name: tmp_path_factory.mktemp("case") for name in CASES}
    cases = []
    for name, (size, culprit, what, changes) in CASES.items():
        given = {"train__steps": "100000", "parallel__timeout": str(TIMEOUT), "run_dir": str(folders[name])} | changes
        cases.append((name, (size, culprit, what, flags(**given)), free_port(), str(folders[name])))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    ends = json.loads(run.stdout)
    result = {}
    for name, folder in folders.items():
        own = [end[1:] for end in ends if end[0] == name]
        told = "".join((folder / f"error{rank}").read_text() for rank in range(len(own)))
        when = float((folder / "when").read_text())
        last = max(at for code, at, _ in own if code != -9)
        result[name] = Ended([e[0] for e in own], told, [p for e in own for p in e[2]], last - when, folder)
    yield result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "told", "rank", "frame"),
    [
        ("reading", r"rank 1 is at step 4, training, reading images of micro-batch 0, for \d s; rank 0 waits in \w+ ",
         1, r"in <lambda>\n.*datasets|in <lambda>"),
        ("worker", r"rank 0 is at step \d, training, reading images of micro-batch 0, for \d s\n", 0, "in __getitem__"),
        ("stopped", r"rank 1 \(process \d+ on \S+, stopped\) gives no sign since [\d:]+, when it was at step 4, "
         r"training; ranks 0, 2 wait in .*\n.*; none of rank 1\n", 0, "in wait"),
        ("store stopped", r"rank 1 is at step 4, .* in \w+ along .*, for \d s; no store answers", 1, "in wait"),
        ("collective", r"all ranks wait for each other: rank 0 is at step 4, .*micro-batch \d on stage 0, in recv "
         r"along the pipeline axis \(0, 1\), for \d s; rank 1 is at step 4, training, in all_reduce", 1, "in barrier"),
        ("endless", r"rank 0 is at step 4, training, for \d s\n", 0, "in step"),
    ],
)  # fmt: skip
def test_the_rank_that_hangs_is_named_and_all_end(
    ended: dict[str, Ended], case: str, told: str, rank: int, frame: str
) -> None:
    end = ended[case]
    assert re.match(rf"prog: the run hangs: {told}", end.told), end.told
    assert end.told.count("the run hangs") == 1 and len(end.told.splitlines()) == 2, end.told
    assert set(end.codes) == ({1, -9} if case == "store stopped" else {1}) and not end.left
    assert TIMEOUT / 2 <= end.seconds < 30  # a worker reads later than it is asked
    assert re.search(frame, end.stacks(rank)) and str(end.folder / "hang") in end.told


@pytest.mark.slow
@pytest.mark.parametrize("case", ["slow", "at work"])
def test_slow_steps_are_no_hang(ended: dict[str, Ended], case: str) -> None:
    end = ended[case]
    assert set(end.codes) == {0} and end.told == "" and not (end.folder / "hang").exists()
    assert end.seconds > TIMEOUT


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    where = Whereabouts()
    still = _Still(where)
    time.sleep(0.2)
    still.look(most=0.01)
    assert still.seconds <= 0.01
    where.now("next")
    still.look(most=0.01)
    assert still.seconds == 0


def sign(place: str = "step 3", wait: str | None = None, stacks: str | None = "/run/hang/a") -> Sign:
    return Sign(host="h", machine="h 1", pid=7, place=place, wait=wait, still=9.0, written=0.0, stacks=stacks)


def test_many_ranks_are_told_shortly() -> None:
    waiting = {rank: sign(wait="recv along x") for rank in range(200, 1000)}
    told = verdict(waiting | {1: sign()}, {}, {})
    assert told.startswith("the run hangs: rank 1 is at step 3, for 9 s; ranks 200, 201,") and len(told) < 300
    lost = {rank: sign(stacks=None) for rank in range(200)}
    told = verdict(waiting, lost, dict.fromkeys(lost, "on another host"))
    assert (
        "and 192 more ranks; ranks 200, 201, 202, 203, 204, 205, 206, 207 and 792 more wait in recv" in told
        and len(told) < 2000
    )


def test_a_call_that_never_returns_is_left_behind() -> None:
    assert Attempt(lambda: 3, 5.0).answers == [3]
    assert Attempt(lambda: time.sleep(5), 0.05).answers == []
    assert Attempt(lambda: 1 // 0, 5.0).answers == []
