"""Ranks on two hosts, with nothing but a link between them: the same numbers, and what a cut of the link leads to."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pretrain_vit
from engine.run.launch import run_rank
from tests.engine.run.test_failures import ROOT, environment
from tests.engine.small import flags
from tests.hosts import two_hosts
from tests.parity.cases import Case
from tests.parity.climb import Climb
from tests.parity.test_ladder import assert_same, reference
from tests.tools.restarts import ELASTIC, PATIENCE, Job
from tests.tools.test_restarts import check

# Two ranks on each host, of which the outermost axis with more than one crosses the link.
RUNGS = (
    Case("parallel", tensor=2, data=2),
    Case("parallel", tensor=2, pipeline=2, micro_batches=4, schedule="zb_v", policy="ready"),
    Case("sequential", tensor=4, sequence_parallel=True),
)
SCRIPT = """
import pickle, sys
from pathlib import Path

import torch

from parallel import grid, process_group
from tests.parity.climb import climb_all

opened = set()

def noted(axis, *given, open_channel=grid._open_channel):
    channel = open_channel(axis, *given)
    opened.add((axis.ranks, channel is not None))
    return channel

grid._open_channel = noted
torch.set_num_threads(1)
world = process_group.read_world()
process_group.start(world, torch.device("cpu"), 120.0)
cases = pickle.loads(bytes.fromhex(sys.argv[1]))
found = climb_all(world, cases)
Path(sys.argv[2], str(world.rank)).write_bytes(pickle.dumps((opened, found)))
process_group.stop()
"""


@pytest.mark.slow
def test_the_ladders_smallest_rung_over_two_hosts(tmp_path: Path) -> None:
    """By torchrun. Ranks of one host use shared memory, those of two never."""
    (tmp_path / "climb.py").write_text(SCRIPT)
    argv = [tmp_path / "climb.py", pickle.dumps(RUNGS).hex(), tmp_path]
    with two_hosts() as hosts:
        meeting = ["--nnodes", "2", "--master-addr", hosts.addresses[0], "--master-port", "29500"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "2", "--node-rank"]
        launchers = [
            hosts.start(
                host, [*torchrun, str(host), *argv], environment(OMP_NUM_THREADS="1"), cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for host in range(2)
        ]  # fmt: skip
        said = [launcher.communicate(timeout=2 * PATIENCE)[0].decode() for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], said
    opened, climbs = set[tuple[tuple[int, ...], bool]](), dict[Case, Climb]()
    for rank in range(4):
        seen, found = pickle.loads((tmp_path / str(rank)).read_bytes())
        opened, climbs = opened | seen, climbs | (found or {})
    assert opened and all(shared == (set(ranks) <= {0, 1} or set(ranks) <= {2, 3}) for ranks, shared in opened), opened
    assert {shared for _, shared in opened} == {True, False}
    for case in RUNGS:
        assert_same(climbs[case], reference(case.one_process))


@contextmanager
def job(folder: Path, **changes: str) -> Iterator[Job]:
    folder.mkdir()
    with two_hosts() as hosts:
        job = Job(folder, hosts=hosts, parallel__timeout="10", train__global_batch_size="24", **changes)
        try:
            yield job
        finally:
            job.close()


def last_step(job: Job) -> int:
    return max(map(int, re.findall(r"\] step +(\d+)/", job.said())))


def await_step(job: Job, step: int) -> None:
    until = time.monotonic() + PATIENCE
    while last_step(job) < step:
        assert time.monotonic() < until, job.said()[-3000:]
        time.sleep(0.05)


def losses(run_dir: Path, steps: int) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train" and line["step"] <= steps]


@pytest.mark.slow
def test_a_link_is_cut_in_mid_run(tmp_path: Path) -> None:
    """Two runs at once, as they wait most of the time. One is as large as it is: cut for a moment it just goes on, cut
    for longer both its hosts say so, once each, and end. The other is elastic: the host with the store goes on, the one
    that was cut off has part in it again. The numbers are those of one process.
    """
    elastic = (*ELASTIC, "--rdzv-endpoint", "10.77.0.1:29400", "--max-restarts", "3")
    static = ("--nnodes", "2", "--master-addr", "10.77.0.1", "--master-port", "29500", "--node-rank")
    with job(tmp_path / "fixed") as fixed, job(tmp_path / "elastic", parallel__elastic="true") as free:
        assert fixed.hosts is not None and free.hosts is not None
        free.start(*elastic, host=0)
        for host in range(2):
            fixed.start(*static, str(host), host=host)
        free.start(*elastic, host=1)
        fixed.trains(1)
        fixed.hosts.cut()
        time.sleep(1.0)
        fixed.hosts.join()
        await_step(fixed, last_step(fixed) + 10)
        fixed.hosts.cut()
        free.await_said("24 images = 2 data rank(s)")
        starts = free.said().count("Vitruvius: torch ")
        free.trains(starts)
        free.hosts.cut()
        free.trains(starts + 1)
        assert "24 images = 1 data rank(s)" in free.said().split("Vitruvius: torch ")[-1]
        free.hosts.join()
        assert [fixed.code(0), fixed.code(1)] == [1, 1], fixed.said()
        free.await_said("24 images = 2 data rank(s)", times=2)  # perhaps not in the first start that it brings about
        free.trains(free.said().count("Vitruvius: torch "))
        free.signal(signal.SIGTERM, 1)
        assert [free.code(0), free.code(1)] == [3, 3], free.said()
    told = re.findall(r"^(?:pretrain_vit.py|tools.launch): .*", fixed.said(), re.MULTILINE)
    assert len(told) == 2 and all("the run hangs: rank" in line for line in told), told
    assert free.said().count("the run hangs: rank") == 2 and "other hosts have come" in free.said()
    check(free)
    given = {"train__steps": "100000", "train__stop_step": "30", "train__global_batch_size": "24", "log__interval": "1"}
    alone = flags(run_dir=str(tmp_path / "alone"), **given)
    assert run_rank(pretrain_vit.main, alone, "pretrain_vit.py") == 3
    for run in (fixed, free):
        found = losses(run.run_dir, 30)
        assert found == pytest.approx(losses(tmp_path / "alone", len(found)), rel=1e-5) and len(found) > 12
