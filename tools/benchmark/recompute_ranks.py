"""A process of `python -m tools.benchmark recompute`: steps of this engine and of eager PyTorch, each in several ways.

`python -m tools.benchmark.recompute_ranks SOCKET`, started by tools.benchmark.turns. One set of weights per program
serves all its ways, so all of them can take turns in one process; memory is measured in a process of one way alone.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from tools.benchmark.peer_programs import Step, Stopwatch, Task
from tools.benchmark.resident import give_back, resident_bytes


@dataclass(frozen=True)
class Switched:
    """A program.

    Attributes:
        step: as of peer_programs. use: choose the way of the steps to come. sets: of ours, by the block, as it was
            built. keep: gradients from now on.
    """

    step: Step
    use: Callable[[Any], object]
    sets: Sequence[str] = ()
    keep: Callable[[], object] = lambda: None


def ours(task: Task) -> Switched:
    """The engine; its ways are values of recompute.policy, or None for that which it was built with."""
    from engine.recompute.assignment import assignment
    from engine.recompute.config import RecomputeConfig
    from tools.benchmark.peer_vitruvius import own_batches, stepper_of

    stepper = stepper_of(task)
    a, batches = stepper.assembly, own_batches(task, stepper)

    def use(policy: str | None) -> None:
        if policy is not None:
            sets = assignment(RecomputeConfig(policy=policy), a.layers, a.frozen.passes)
            assert a.recompute is not None, "it was built with a policy that computes something again"
            a.recompute.sets = {layer: of for layer, of in sets.items() if of.drops}

    chosen = [of.name for layer, of in a.sets.items() if layer.startswith("blocks.")]
    return Switched(lambda number: stepper.train_step(batches[number % len(batches)], task.lr).loss, use, chosen)


def theirs(task: Task) -> Switched:
    """EagerViT, over several ranks by DDP; its ways are those of recompute_theirs.WAYS."""
    import torch

    from tools.benchmark import peer_torch
    from tools.benchmark.eager_vit import EagerSizes, EagerViT
    from tools.benchmark.recompute_theirs import Checkpointed

    peer_torch.set_matmul(task)
    core = EagerViT(EagerSizes(**task.sizes))
    peer_torch.fill(core, task)
    model = Checkpointed(core)
    whole = peer_torch.data_parallel(model)
    low = partial(torch.autocast, "cpu", torch.bfloat16)
    kept = list[bool]()
    step = peer_torch.plain_step(
        whole, task, low if task.dtype == "bf16" else nullcontext, keeps_gradients=lambda: bool(kept)
    )
    return Switched(step, partial(setattr, model, "way"), keep=partial(kept.append, True))


def serve(socket: Connection) -> None:
    """Build the programs of the task, say so, then answer messages until the other end closes: {"program", "way",
    "step"} is a step; with "measure", one whose memory is measured.
    """
    received = socket.recv()
    task = Task(**received["task"])
    for module in received["imports"]:
        importlib.import_module(module)
    imports = resident_bytes()
    programs = {name: {"ours": ours, "theirs": theirs}[name](task) for name in received["programs"]}
    answer: dict[str, Any] = {"ready": True}
    while True:
        socket.send({**answer, "peak_bytes": resident_bytes("VmHWM"), "imports_bytes": imports})
        try:
            message = socket.recv()
        except EOFError:
            return
        program = programs[message["program"]]
        program.use(message["way"])
        answer = (_measured if message.get("measure") else _timed)(program, message["step"])


def _timed(program: Switched, number: int) -> dict[str, Any]:
    with Stopwatch() as watch:
        loss = program.step(number)
    return {"seconds": watch.wall, "loss": loss, "sets": list(program.sets)}


def _measured(program: Switched, number: int) -> dict[str, Any]:
    """What a step takes beside weights, gradients, and state of the optimizer, which are there before it."""
    program.keep()
    program.step(number)
    before = give_back()
    loss = program.step(number)
    return {"activation_bytes": resident_bytes("VmHWM") - before, "loss": loss}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down
