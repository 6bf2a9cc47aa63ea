"""A rank of one of the programs that `python -m tools.benchmark contrastive` compares.

`python -m tools.benchmark.contrastive_ranks SOCKET`, started by tools.benchmark.turns. It answers each message, a step
to take, with what that took. Both programs have the same embeddings, matrix library and allocator.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.device import prepare_cpu, set_matmul
from engine.precision.config import PrecisionConfig
from parallel import process_group
from parallel.comm import Axis
from parallel.contrastive import info_nce, sigmoid
from parallel.grid import GridShape, make_grid
from parallel.process_group import read_world
from tools.benchmark.resident import give_back, resident_bytes

_GEMM = 2048

Numbers = dict[str, float]
Step = Callable[[str, Tensor, Tensor, Tensor, Tensor], Numbers]


def serve(socket: Connection) -> None:
    """Say when this rank is ready, then take a step per message, until the other end closes."""
    task = socket.recv()
    world = read_world()
    prepare_cpu(world)
    set_matmul(PrecisionConfig(), torch.device("cpu"))
    process_group.start(world, torch.device("cpu"), 900.0)
    axis = make_grid(GridShape(data=world.size), world).data
    step = _ours(axis) if task["program"] == "vitruvius" else _open_clip(axis)
    answer: dict[str, Any] = {"ready": True}
    while True:
        socket.send(answer)
        try:
            wanted = socket.recv()
        except EOFError:
            return
        answer = _gemm() if wanted["loss"] == "gemm" else _measured(step, wanted, axis)


def _measured(step: Step, wanted: dict[str, Any], axis: Axis) -> Numbers:
    """Seconds of a step, and the most memory in it beside the embeddings of this rank and their gradients."""
    left, right = _embeddings(wanted["batch"] // axis.size, wanted["width"], axis.index)
    scale, bias = (torch.tensor(float(wanted[name])) for name in ("scale", "bias"))
    before = give_back()
    start = time.perf_counter()
    numbers = step(wanted["loss"], left, right, scale, bias)
    took = time.perf_counter() - start
    return {**numbers, "seconds": took, "peak": resident_bytes("VmHWM") - before - left.nbytes - right.nbytes}


def _embeddings(rows: int, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Pairs that are somewhat alike, of length 1."""
    left, noise = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(rank)).unbind(0)
    return F.normalize(left, dim=1), F.normalize(0.3 * left + noise, dim=1)


def _gemm() -> Numbers:
    """Seconds of a product of 2,048 x 2,048."""
    a, b = torch.randn(2, _GEMM, _GEMM).unbind(0)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return {"flop_per_second": 2 * _GEMM**3 / sorted(times)[1]}


def _ours(axis: Axis) -> Step:
    def step(loss: str, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Numbers:
        if loss == "infonce":
            found = info_nce(left, right, scale, axis)
        else:
            found = sigmoid(left, right, scale, bias, axis)
        assert found.left is not None and found.right is not None
        return {"loss": float(found.loss), "left": float(found.left.norm()), "right": float(found.right.norm())}

    return step


def _open_clip(axis: Axis) -> Step:
    """Their loss of a rank is a mean over its own pairs, so the mean over ranks is the loss, and gradients are as many
    times too large as there are ranks (which DDP divides by).
    """
    theirs = _module()
    ranks = {"rank": axis.index, "world_size": axis.size}
    losses = {
        "infonce": theirs.ClipLoss(local_loss=True, gather_with_grad=True, **ranks),
        "sigmoid": theirs.SigLipLoss(**ranks),
    }

    def step(loss: str, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Numbers:
        leaves = [x.requires_grad_() for x in (left, right, scale, bias)]
        value = losses[loss](*leaves[: 3 if loss == "infonce" else 4])
        value.backward()
        left_grad, right_grad = (float(x.grad.norm()) / axis.size for x in leaves[:2])  # type: ignore[union-attr]
        return {"loss": float(value) / axis.size, "left": left_grad, "right": right_grad}

    return step


def _module() -> ModuleType:
    """open_clip's losses alone, which need nothing but torch."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations is not None
    file = Path(next(iter(package.submodule_search_locations))) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down
