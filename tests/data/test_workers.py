"""Data workers when a job is stopped: signals to all its processes, and the end of the one that they read for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
READS = """
import sys, time
from multiprocessing import active_children

import numpy as np

from data.config import DataConfig
from data.datasets import Dataset
from data.loader import TrainStream


class Images(Dataset):
    image_shape, labels, crops_when_read = (1, 4, 4), np.zeros(64, dtype=np.int64), False

    def __len__(self):
        return 64

    def read(self, indices, crop=None):
        import torch

        return torch.zeros(len(indices), *self.image_shape)


stream = TrainStream(
    Images(), config=DataConfig(workers=2), global_batch_size=16, micro_batch_size=1, data_rank=0, data_size=1, seed=0
)
steps = stream.steps(0)
while True:
    for batch in next(steps):
        pass
    print(*[worker.pid for worker in active_children()], flush=True)
    what = sys.stdin.readline()
    if what == "close\\n":
        began = time.monotonic()
        del batch
        steps.close()
        print(time.monotonic() - began, len(active_children()), flush=True)
        steps = stream.steps(3)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_workers_mind_their_parent_alone() -> None:
    """They read on when a signal to stop reaches every process, and end at once when closed, or left by a kill."""
    command = [sys.executable, "-c", READS]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None

    def say(what: str) -> list[str]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        return process.stdout.readline().split()

    try:
        workers = process.stdout.readline().split()
        assert len(workers) == 2
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            for worker in workers:
                os.kill(int(worker), number)
        assert say("go on") == workers == say("go on")
        seconds, left = say("close")
        assert float(seconds) < 4 and left == "0"  # torch waits 5 s for one that does not end
        workers = process.stdout.readline().split()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 4  # torch's workers look every 5 s
        while any(alive(int(worker)) for worker in workers):
            assert time.monotonic() < deadline, "a worker outlives the process that it reads for"
            time.sleep(0.02)
        assert process.stderr.read() == ""
    finally:
        process.kill()
