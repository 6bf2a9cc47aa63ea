"""Ranks that train, each a process that is forked from one that has imported everything: a run starts in a moment.

As under torchrun the store is not theirs; but nobody ends those that are left, or starts them again. Signals, exit
codes and output are those of real ranks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed import _CONTEXT, free_port
from tests.engine.small import flags

PATIENCE = 60.0  # seconds


class Run:
    """A run's ranks.

    Args:
        folder: gets what they say. size: ranks. argv: of pretrain_vit.py. planted: a program that each rank executes
            first, with `rank` and `folder`. ignored: signals that are ignored from the start, as under nohup.
        environ: of the ranks.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        argv: Sequence[str],
        planted: str = "",
        ignored: Sequence[signal.Signals] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run_dir = folder, Path(argv[list(argv).index("--run_dir") + 1])
        port, given = free_port(), {"TORCHELASTIC_USE_AGENT_STORE": "True"} | dict(environ or {})
        self._store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self.ranks = [
            _CONTEXT.Process(
                target=_main, args=(rank, size, port, list(argv), planted, list(ignored), given, str(folder))
            )
            for rank in range(size)
        ]
        for rank in self.ranks:
            rank.start()

    def kill(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks, to all if none is named."""
        for rank in ranks or range(len(self.ranks)):
            pid = self.ranks[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def codes(self) -> list[int | None]:
        """Exit codes; minus the signal of those that were ended by one."""
        until = time.monotonic() + PATIENCE
        for rank in self.ranks:
            rank.join(max(0.0, until - time.monotonic()))
        return [rank.exitcode for rank in self.ranks]

    def wait_for(self, step: int) -> int:
        """Return when rank 0 has told of a step."""
        return wait_for_step(self.run_dir, step, lambda: all(rank.is_alive() for rank in self.ranks), self.said)

    def said(self, *ranks: int) -> str:
        """What ranks have said, all if none is named."""
        files = [self.folder / f"out{rank}" for rank in ranks or range(len(self.ranks))]
        return "".join(file.read_text() for file in files if file.exists())

    def close(self) -> None:
        """No rank is left."""
        for rank in self.ranks:
            rank.kill()
            rank.join()


@contextmanager
def running(folder: Path, size: int, argv: Sequence[str], **more: Any) -> Iterator[Run]:
    """Within, a run."""
    run = Run(folder, size, argv, **more)
    try:
        yield run
    finally:
        run.close()


def long_run(run_dir: Path, **changes: str) -> list[str]:
    """Flags of one that goes on until it is stopped, and tells of each step."""
    given = {"train__steps": "100000", "log__interval": "1", "run_dir": str(run_dir)}
    return flags(**given | changes)


def steps_told(run_dir: Path) -> list[int]:
    """Of the training lines of metrics.jsonl, all of which are whole."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "train"]


def wait_for_step(run_dir: Path, step: int, lives: Callable[[], bool], said: Callable[[], str]) -> int:
    """Return when a run has told of a step."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and lives():
        if (run_dir / "metrics.jsonl").exists():
            told = re.findall(r'"train", "step": (\d+), .*}\n', (run_dir / "metrics.jsonl").read_text())
            if told and int(told[-1]) >= step:
                return int(told[-1])
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {said()}")


def checkpoints(run_dir: Path) -> list[str]:
    """What is in the folder of checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name != ".lock")


def _main(
    rank: int,
    size: int,
    port: int,
    argv: list[str],
    planted: str,
    ignored: list[signal.Signals],
    environ: dict[str, str],
    folder: str,
) -> None:
    import torch

    import pretrain_vit
    from engine.run import launch

    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    out = os.open(f"{folder}/out{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} | environ)
    torch.set_num_threads(1)
    launch._GRACE_SECONDS = 0.5
    exec(planted, {"rank": rank, "folder": folder})
    sys.argv[0] = "prog"
    code = launch.run_rank(pretrain_vit.main, argv, "prog")
    os._exit(code)
