"""Programs run on ranks, one job after the other: one process imports torch, and its children are the ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.distributed import free_port

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import json, os, sys
from importlib import import_module
from engine.run.launch import run_rank

jobs, codes = json.loads(sys.argv[1]), {}
mains = {program: import_module(program).main for _, program, *_ in jobs}
for name, program, size, argv, port, told in jobs:
    ranks = []
    for rank in range(size):
        if pid := os.fork():
            ranks.append(pid)
            continue
        file = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = run_rank(mains[program], argv, "prog")
        sys.stdout.flush()
        os._exit(code)
    codes[name] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
print(json.dumps(codes))
"""


def run_jobs(folder: Path, jobs: Mapping[str, tuple[str, int, list[str]]], *, timeout: float) -> dict[str, list[int]]:
    """Exit codes of the ranks of each job, by its name; what it says is in `folder/NAME.txt`.

    Args:
        jobs: by name, (program: a module with `main`, ranks, arguments). timeout: of all of them, in seconds.
    """
    listed = [(name, *job, free_port(), str(folder / f"{name}.txt")) for name, job in jobs.items()]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(listed)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    codes: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return codes
