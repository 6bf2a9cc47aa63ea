"""Kills ranks of a run at random and starts it again: what it leaves must be what an undisturbed run leaves.

    python -m tests.soak --kills 30 --layout 2x2x2 --zero 1
    python -m tests.soak --kills 30 --layout 4 --zero 3 --async_save

A kill is SIGKILL to one rank, while the run starts, in a step, or within a save, which a folder that is being written
tells. The others are killed a moment later, as a launcher does. Ranks are forked from this process, which has imported
torch, so starting again is quick. Metrics, curves and each tensor of the last checkpoint are compared, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import tensorboard.compat.proto.summary_pb2  # so that ranks need not
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch.utils.tensorboard.summary  # noqa: F401

import pretrain_vit
from engine.config.cli import parse
from engine.frozen import frozen_of
from engine.objectives import make_objective
from engine.run.launch import run_rank
from tests.distributed import free_port
from tests.engine.run.test_resume import assert_equal
from tests.engine.small import flags

_MOST_STEPS, _SAVE_INTERVAL = 5, 2  # from one kill to the next; between saves
_PATIENCE = 300.0  # seconds without what is waited for
_KILLED = -signal.SIGKILL


@dataclass
class Run:
    """A run in a folder, of as many attempts as it takes.

    Attributes:
        size: ranks. flags: of pretrain_vit.py. ranks: processes of this attempt. since: of when its predecessor is.
    """

    folder: Path
    size: int
    flags: list[str]
    ranks: list[int] = field(default_factory=list)
    since: int = 0

    def start(self) -> None:
        """Fork all ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        port, self.since = str(free_port()), self._configured()
        self.ranks = [self._fork(rank, port) for rank in range(self.size)]

    def _fork(self, rank: int, port: str) -> int:
        if pid := os.fork():
            return pid
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os._exit(run_rank(pretrain_vit.main, [*self.flags, "--run_dir", str(self.folder)], "pretrain_vit.py"))

    def _configured(self) -> int:
        """When the file that an attempt writes last before its first step was written."""
        try:
            return (self.folder / "config.yaml").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def trains(self) -> bool:
        """Whether this attempt has come to its steps."""
        return self._configured() not in (0, self.since)

    def step(self) -> int:
        """The last that metrics.jsonl tells of."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith(b"\n")), 0)

    def is_saving(self) -> bool:
        """Whether a save is under way, or was cut off."""
        return any((self.folder / "checkpoints").glob("*.writing"))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Raises RuntimeError where a rank ends first, or the condition does not come true."""
        until = time.monotonic() + _PATIENCE
        while not condition():
            ended = any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.ranks)
            if ended or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"ranks {'ended' if ended else 'stand still'}: see the end of {self.folder / 'log'}")
            time.sleep(0.002)

    def finish(self) -> list[int]:
        """Exit codes, once all ranks have ended."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.ranks]

    def kill(self) -> list[int]:
        """All ranks that are left."""
        for pid in self.ranks:
            os.kill(pid, signal.SIGKILL)  # one that has ended is waited for only now
        return self.finish()


def disturb(run: Run, kills: int, draw: random.Random) -> tuple[Counter[str], list[float]]:
    """Start the run and kill a rank, so many times. Returns how many fell where, and seconds from starts to steps."""
    fell, starts = Counter[str](), [1.0]
    for number in range(1, kills + 1):
        began = time.monotonic()
        run.start()
        aim = draw.choice(("start", "step", "step", "save", "save"))
        if aim == "start":
            time.sleep(draw.uniform(0.0, 1.5 * starts[-1]))
        else:
            run.wait_for(run.trains)
            starts.append(time.monotonic() - began)
            _wait_in(run, draw.randrange(_MOST_STEPS), aim)
            time.sleep(draw.expovariate(100.0))
        victim = draw.randrange(run.size)
        os.kill(run.ranks[victim], signal.SIGKILL)
        time.sleep(draw.choice((0.0, 0.02, 0.2)))  # the others go on as far as they can
        if any(code not in (_KILLED, 1) for code in run.kill()):
            raise RuntimeError(f"kill {number} came too late, or ranks failed: see the end of {run.folder / 'log'}")
        place = "start" if not run.trains() else "save" if run.is_saving() else "step"
        fell[place] += 1
        print(f"kill {number}: rank {victim} in a {place}, metrics up to step {run.step()}", flush=True)
    return fell, starts[1:]


def _wait_in(run: Run, steps: int, aim: str) -> None:
    target = run.step() + steps
    run.wait_for(lambda: run.step() >= target)
    if aim == "save":
        run.wait_for(run.is_saving)


def soak(folder: Path, layout: str, zero: int, kills: int, seed: int, async_save: bool) -> None:
    """Both runs, and the comparison. Raises AssertionError where they differ, RuntimeError where one fails."""
    sizes = [int(size) for size in layout.split("x")]
    pipeline, data, tensor = sizes if len(sizes) == 3 else (1, *sizes, 1)
    steps = kills * (_MOST_STEPS + 2) + 5
    keys = {
        "parallel.pipeline_parallel_size": pipeline, "parallel.tensor_parallel_size": tensor,
        "parallel.zero_stage": zero, "parallel.timeout": 120, "train.steps": steps, "train.global_batch_size": 16,
        "train.eval_interval": 7, "schedule.warmup_steps": 10, "optimizer.ema_decay": 0.9, "precision.dtype": "bf16",
        "model.drop_path": 0.1, "data.rotate": 10, "data.crop_min_area": 0.5, "log.interval": 1,
        "log.tensorboard": "true", "checkpoint.save_interval": _SAVE_INTERVAL, "checkpoint.async_save": async_save,
    }  # fmt: skip
    argv = flags(**{key.replace(".", "__"): str(value).lower() for key, value in keys.items()})
    ranks = pipeline * data * tensor
    config = parse(argv)[0].resolve(ranks)
    frozen_of(config, make_objective(config).layers)  # imports what each rank would by itself
    undisturbed, disturbed = Run(folder / "undisturbed", ranks, argv), Run(folder / "disturbed", ranks, argv)
    began = time.monotonic()
    undisturbed.start()
    assert set(undisturbed.finish()) == {0}, f"see {undisturbed.folder / 'log'}"
    straight = time.monotonic() - began
    fell, starts = disturb(disturbed, kills, random.Random(seed))
    disturbed.start()
    assert set(disturbed.finish()) == {0}, f"see {disturbed.folder / 'log'}"
    assert_equal(disturbed.folder, undisturbed.folder, steps)
    where = ", ".join(f"{fell[place]} in a {place}" for place in ("start", "step", "save"))
    print(
        f"{layout}, ZeRO {zero}, {'asynchronous' if async_save else 'synchronous'} saves, seed {seed}: {kills} kills "
        f"({where}) in a run of {steps} steps; metrics, curves and all tensors are bit-identical to the undisturbed "
        f"run's. From a start to its first step {sorted(starts)[len(starts) // 2] if starts else 0:.1f} s (median); "
        f"undisturbed {straight:.0f} s, disturbed {time.monotonic() - began - straight:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--layout", default="2x2x2", help="pipeline x data x tensor, or data alone")
    parser.add_argument("--zero", type=int, default=1, help="parallel.zero_stage")
    parser.add_argument("--async_save", action="store_true", help="checkpoint.async_save")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # which stays where something went wrong
    soak(folder, given.layout, given.zero, given.kills, given.seed, given.async_save)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
