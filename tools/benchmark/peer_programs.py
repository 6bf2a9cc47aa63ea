"""A process of one of the programs that `python -m tools.benchmark peers --against ...` compares.

`python -m tools.benchmark.peer_programs SOCKET`, started by tools.benchmark.turns in the environment of the program.
Each program is a module of its own, imported here and nowhere else, so that a process holds no other's libraries.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tools.benchmark.resident import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

Step = Callable[[int], float]  # number of the step -> loss of this rank's images

# Module and function that build a program's step.
PROGRAMS = {
    "vitruvius": ("tools.benchmark.peer_vitruvius", "vitruvius"),
    "eager": ("tools.benchmark.peer_torch", "eager"),
    "torch_pipeline": ("tools.benchmark.peer_pipeline", "torch_pipeline"),
    "fsdp2": ("tools.benchmark.peer_torch", "fsdp2"),
    "deepspeed": ("tools.benchmark.peer_deepspeed", "deepspeed"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to train.

    Attributes:
        program: one of PROGRAMS. sizes: of EagerViT. dtype: fp32 or bf16. matmul: onednn or mkl. lr, betas, eps,
            weight_decay: of AdamW. weights, batches: .npz files, read one array at a time. shares: pieces that a global
            batch is stored in, one per data-parallel rank. distinct: batches there are. flags: of the engine.
            settings: of the program alone.
    """

    program: str
    sizes: dict[str, int]
    dtype: str
    matmul: str
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    weights: str
    batches: str
    shares: int
    distinct: int
    flags: list[str]
    settings: dict[str, Any]

    def own_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of this rank's share of each batch; of the whole batch, where there is one rank."""
        import numpy as np
        import torch

        rank, alone = int(os.environ["RANK"]), os.environ["WORLD_SIZE"] == "1"
        own = range(self.shares) if alone else [rank % self.shares]  # pipeline ranks lie outside of data ranks
        with np.load(self.batches) as file:
            for number in range(self.distinct):
                images, labels = ([file[f"{kind}_{number}_{share}"] for share in own] for kind in ("images", "labels"))
                yield torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))


def serve(socket: Connection) -> None:
    """Build the program, say so, then do a step per message {"step": number}, until the other end closes."""
    task = Task(**socket.recv())
    module, function = PROGRAMS[task.program]
    build: Callable[[Task], Step] = getattr(importlib.import_module(module), function)
    imports = resident_bytes("VmRSS")
    step = build(task)
    answer = {"ready": 1.0}
    waited = Stopwatch()
    while True:
        memory = {"peak_bytes": resident_bytes("VmHWM"), "imports_bytes": imports}
        socket.send({**answer, **memory, "waited_seconds": waited.wall, "waited_cpu_seconds": waited.cpu})
        try:
            with waited if "seconds" in answer else nullcontext():  # not counted: while others are still being built
                number = socket.recv()["step"]
        except EOFError:
            return
        with Stopwatch() as step_time:
            loss = step(number)
        answer = {"seconds": step_time.wall, "cpu_seconds": step_time.cpu, "loss": loss}


class Stopwatch:
    """Sums the wall-clock seconds of the blocks it is entered for, and the CPU seconds of all threads in them."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Stopwatch:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down
