"""A rank of the pipelines that `python -m tools.benchmark pipeline` measures.

`python -m tools.benchmark.pipeline_ranks SOCKET`, started by tools.benchmark.turns. The first message says what it is,
each one after it is a case to be run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.device import prepare_cpu
from parallel import process_group
from parallel.grid import GridShape, make_grid
from parallel.process_group import World, read_world
from tools.benchmark.sleepers import Case, Sleepers
from tools.benchmark.toys import Measured, Toy, Toys

_TIMEOUT = 600.0
Answer = dict[str, Any]


def _sleepers(world: World) -> Callable[[Answer], Answer]:
    ranks = Sleepers(world)
    return lambda message: {"figures": ranks.run(Case(**message))}


def _toys(world: World) -> Callable[[Answer], Answer]:
    grid = make_grid(GridShape(pipeline=world.size), world)
    return _measured(Measured(Toys(world, grid).prepare, grid))


def _torch_toys(world: World) -> Callable[[Answer], Answer]:
    from tools.benchmark.toys_torch import TorchToys

    return _measured(Measured(TorchToys(world).prepare, make_grid(GridShape(pipeline=world.size), world)))


def _measured(ranks: Measured) -> Callable[[Answer], Answer]:
    return lambda message: asdict(ranks.run(Toy(**message["toy"]), message["passes"]))


KINDS = {"sleepers": _sleepers, "vitruvius": _toys, "torch": _torch_toys}


def serve(socket: Connection) -> None:
    """Answer until the other end closes."""
    kind, world, cpu = socket.recv()["kind"], read_world(), torch.device("cpu")
    prepare_cpu(world)
    process_group.start(world, cpu, _TIMEOUT)
    run = KINDS[kind](world)
    answer: Answer = {"ready": True}
    while True:
        socket.send(answer)
        try:
            message = socket.recv()
        except EOFError:
            return
        answer = run(message)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down
