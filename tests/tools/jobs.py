"""Programs run on ranks, one job after the other: ranks are forked from one process, itself from one that is warm."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from engine.run.launch import run_rank
from tests.distributed import _CONTEXT, free_port

ROOT = Path(__file__).parents[2]


class _Job(NamedTuple):
    """name. program: a module with `main`. size: ranks. port: for their store. told: the file for what they say."""

    name: str
    program: str
    size: int
    argv: Sequence[str]
    port: int
    told: Path


def run_jobs(folder: Path, jobs: Mapping[str, tuple[str, int, list[str]]], *, timeout: float) -> dict[str, list[int]]:
    """Exit codes of the ranks of each job, by its name; what it says is in `folder/NAME.txt`.

    Args:
        jobs: by name, (program: a module with `main`, ranks, arguments). timeout: of all of them, in seconds.
    """
    listed = [_Job(name, *job, free_port(), folder / f"{name}.txt") for name, job in jobs.items()]
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_all, args=(listed, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout), f"the jobs did not end in {timeout} s"
        codes: dict[str, list[int]] = ours.recv()
    finally:
        assert process.pid is not None
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        ours.close()
    return codes


def _all(jobs: list[_Job], pipe: Connection) -> None:
    """Of the process whose children the ranks are."""
    os.setsid()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    mains = {job.program: import_module(job.program).main for job in jobs}
    pipe.send({job.name: _ranks(job, mains[job.program]) for job in jobs})


def _ranks(job: _Job, main: Callable[..., object]) -> list[int]:
    ranks = []
    for rank in range(job.size):
        if pid := os.fork():
            ranks.append(pid)
            continue
        file = os.open(job.told, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        own, size = str(rank), str(job.size)
        os.environ.update(RANK=own, LOCAL_RANK=own, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
        sys.argv[:] = ["prog", *job.argv]
        code = run_rank(main, job.argv, "prog")
        sys.stdout.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
