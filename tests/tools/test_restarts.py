"""A launcher starts a run again: it goes on by itself from the newest checkpoint, on as many hosts as there are."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.restarts import Job, host_lost_and_back, rank_killed

BATCH = {"parallel__elastic": "true", "train__global_batch_size": "24", "checkpoint__resume": "never"}
PLANTED = """
import os, sys
import pretrain_vit
from engine.checkpoint import folder as folders, saver
from engine.run.launch import run_rank

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def write(path, items, metadata, tell, write=saver.write_file):
    if attempt == 0 and os.environ["RANK"] == "1" and "00000015" in str(path):
        write(path, items[:3], metadata, tell)
        os.kill(os.getpid(), 9)
    return write(path, items, metadata, tell)

def sync(folder, sync=folders.sync):
    if attempt == 1 and "00000020.writing" in str(folder):
        os.kill(os.getpid(), 9)
    return sync(folder)

saver.write_file, folders.sync = write, sync
sys.exit(run_rank(pretrain_vit.main, sys.argv[1:], "pretrain_vit.py"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path


def check(job: Job) -> None:
    """The last step is saved, nothing is half written, and every step has one line."""
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    names = sorted(path.name for path in (job.run_dir / "checkpoints").iterdir() if path.name != ".lock")
    assert names[-1] == f"step-{len(steps):08d}" and all(len(name) == 13 for name in names), names


@pytest.mark.slow
def test_killed_in_the_middle_of_saves_and_started_again(folder: Path) -> None:
    """`never` is of checkpoints that were there before, not of this run's own."""
    (folder / "planted.py").write_text(PLANTED)
    job = Job(folder, checkpoint__resume="never")
    try:
        job.start("--max-restarts", "2", script=str(folder / "planted.py"))
        job.trains(3)
        job.signal(signal.SIGTERM)
        assert job.code() == 3, job.said()
    finally:
        job.close()
    assert job.resumed_at() == [10, 15] and job.said().count("all ranks start again") == 2
    check(job)


@pytest.mark.slow
def test_torchrun_starts_ranks_again(folder: Path) -> None:
    job = Job(folder)
    try:
        rank_killed(job, "torch.distributed.run")
        job.signal(signal.SIGTERM)
        assert job.code() == 1  # torchrun's, whatever its ranks say
    finally:
        job.close()
    assert len(job.resumed_at()) == 1
    check(job)


@pytest.mark.slow
def test_hosts_are_lost_and_come_back(folder: Path) -> None:
    """The global batch stays; one launcher's signal ends all."""
    job = Job(folder, **BATCH)
    try:
        host_lost_and_back(job)
        job.signal(signal.SIGTERM, 2)
        assert (job.code(0), job.code(2)) == (3, 3), job.said()
    finally:
        job.close()
    said = job.said()
    dealt = [said.count(f"batch: 24 images = {ranks} data rank(s)") for ranks in (4, 2)]
    assert dealt == [2, 1] and len(job.resumed_at()) == 2
    assert "other hosts have come: all ranks save, and start again" in said
    check(job)
