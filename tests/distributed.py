"""Runs a function on several ranks, each a fresh process, with a time limit for all of them.

Processes are forked from a server that has imported torch once, so starting eight costs a fraction of a second and
not eight imports. One rank that fails or a time limit that passes ends all of them.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle  # plain: the pipe's own pickler would hand tensors over as files of a process that is gone
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

import pytest
import torch

from parallel import process_group
from parallel.process_group import World

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["engine.run.trainer", "tests.distributed", "tests.parity.climb", "tests.warm"])

RankFunction = Callable[..., Any]
_P, _T = ParamSpec("_P"), TypeVar("_T")


def free_port() -> int:
    """A TCP port that nobody listens on.

    By chance, from those that the system gives to nobody by itself: what another test asks for cannot take it before
    its user listens there.
    """
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port


def _rank_main(
    function: RankFunction, world: World, port: int, timeout: float, kind: str, pipe: Connection, args: tuple
) -> None:
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        if kind == "cuda":
            torch.cuda.set_device(world.local_rank)
        process_group.start(world, torch.device(kind, world.local_rank if kind == "cuda" else 0), timeout)
        pipe.send_bytes(pickle.dumps(("result", function(world, *args))))
        process_group.stop()
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        os._exit(1)


def run_ranks(size: int, function: RankFunction, *args: Any, timeout: float = 60.0, kind: str = "cpu") -> list[Any]:
    """`function(world, *args)` on `size` ranks with a process group; returns each rank's (picklable) result.

    Args:
        kind: of device, `cpu` (gloo) or `cuda` (NCCL, a GPU for each rank).

    Raises:
        AssertionError: a rank failed (its traceback is in the message) or the time limit (seconds) passed.
    """
    port, ranks = free_port(), []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        world = World(rank=rank, size=size, local_rank=rank, local_size=size)
        process = _CONTEXT.Process(
            target=_rank_main, args=(function, world, port, timeout, kind, theirs, args), daemon=True
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        return _collect(ranks, time.monotonic() + timeout)
    finally:
        for process, pipe in ranks:
            process.kill()
            process.join()
            pipe.close()


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        missing = [rank for rank in range(len(ranks)) if rank not in results]
        waiting = multiprocessing.connection.wait([ranks[r][1] for r in missing], deadline - time.monotonic())
        assert waiting, f"ranks {missing} did not finish in time"
        for rank in missing:
            if ranks[rank][1] in waiting:
                try:
                    kind, value = pickle.loads(ranks[rank][1].recv_bytes())
                except EOFError:
                    kind, value = "error", "the process ended without a word"
                assert kind == "result", f"rank {rank} of {len(ranks)}:\n{value}"
                results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def once(launch: Callable[_P, _T]) -> Callable[_P, _T]:
    """`functools.cache` that keeps failures, too: what many tests ask for is launched once, and all fail with it."""

    @cache
    def outcome(*args: Any, **kwargs: Any) -> tuple[_T | None, BaseException | None]:
        try:
            return launch(*args, **kwargs), None
        except (Exception, pytest.fail.Exception) as error:
            return None, error

    @wraps(launch)
    def known(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        result, error = outcome(*args, **kwargs)
        if error is not None:
            raise error.with_traceback(None)
        return result  # type: ignore[return-value]

    return known
