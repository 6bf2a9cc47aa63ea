"""Who this process is among the ranks, and the process group of them all: its start, its end, who reports a failure."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.heartbeat import Signs
from parallel.rendezvous import Place, find_store, first_on_host, meet


@dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is, before any group exists. Made by `read_world`.

    Attributes:
        idle: ranks from `size` on, which only wait for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    idle: int = 0


def read_world(environ: dict[str, str] | None = None) -> World:
    """Rank and world size from torchrun's variables, else SLURM's (`srun`), else one process.

    Raises:
        ValueError: a launcher's variable is not a number, or only some of them are set; or this is not one of the
            job's tasks, but its batch script.
    """
    env = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in env and "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        if names[3] not in env:
            raise ValueError(
                f"this is the batch script of a job of {env['SLURM_NTASKS']} tasks, not one of them: start with srun "
                "or torchrun (one process alone with srun --ntasks 1)"
            )
    if names[0] not in env and names[1] not in env:
        return World()
    try:
        rank, size, local_rank = (int(env[name]) for name in names[:3])
        local_size = int(re.split(r"[(,]", env.get(names[3], "1"))[0])  # SLURM writes 4(x2),3: tasks of each host
    except (KeyError, ValueError) as error:
        raise ValueError(f"the launcher's variables {', '.join(names[:3])} must all be integers: {error}") from error
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def start(world: World, device: torch.device, timeout_seconds: float) -> None:
    """Make the process group: NCCL for CUDA, gloo for the CPU. One process makes none; idle ranks only come together.

    Under srun, MASTER_ADDR and MASTER_PORT default to the first host of the job and a port from the job's number.

    Raises:
        parallel.rendezvous.StartError: not all ranks have come in time.
    """
    global _met, _watched
    if world.size + world.idle == 1:
        return
    host, port = _master()
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    hosts = world.rank == 0 and not by_launcher()
    place = Place(host=host, port=port, rank=world.rank, size=world.size + world.idle, hosts=hosts, run=_attempt())
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    store, _met = meet(place, timeout_seconds)
    _watched = store if world.idle else None
    if world.rank >= world.size or world.size == 1:
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )


def signs(world: World, patience: float) -> Signs | None:
    """Where ranks say how they are, over a connection of its own; None if there is but one, or no store answers.

    Args:
        patience: seconds that the store may take to answer.
    """
    store = None if world.size == 1 else find_store(*_master(), _STORE_PATIENCE)
    if store is None:
        return None
    witness = socket.create_connection(_master(), timeout=_STORE_PATIENCE)
    witness.setblocking(False)
    return Signs(dist.PrefixStore(f"vitruvius/{_attempt()}/signs", store), witness, world.rank, world.size, patience)


def stop() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_report(kind: str, rank: int) -> bool:
    """Whether this rank is the first to report a `kind` of failure; so that one message, not one per rank, reaches the
    user. Works before the process group is made, too, and is meant for ranks that are about to end.

    Ranks agree through a key-value store: that of the launcher, which outlives every rank, else that of rank 0. While
    rank 0 has not opened one, it speaks for all, and the others give it `_STORE_PATIENCE` seconds to open it (which
    means that all is well with rank 0). If it is gone, every rank reports for itself.
    """
    try:
        store = _report_store(rank)
        if store is None:
            return rank == 0
        return bool(store.add(f"vitruvius/{_attempt()}/{kind}", 1) == 1)
    except Exception:  # whatever is wrong with the store must not hide the failure itself
        return True


def first_here_to_report(kind: str, world: World) -> bool:
    """The same among the ranks of this host, which needs no store."""
    host, port = _master()
    place = Place(host=host, port=port, rank=world.rank, size=world.size, hosts=False, run=f"{_attempt()} {kind}")
    return first_on_host(place) is not None


def note_end(code: int, world: World) -> None:
    """Leave word of this exit code to ranks that the launcher starts again; where it does not, nothing is done."""
    if (store := _store_of_starts()) is not None:
        with contextlib.suppress(RuntimeError):
            store.set("vitruvius/ended", f"{code} {world.size}")


def noted_end() -> tuple[int, int] | None:
    """(exit code, ranks) that ranks of an earlier start have left word of."""
    if (store := _store_of_starts()) is not None:
        with contextlib.suppress(RuntimeError):
            if store.check(["vitruvius/ended"]) and (found := store.get("vitruvius/ended")):
                code, size = found.decode().split()
                return int(code), int(size)
    return None


def forget_end(world: World) -> None:
    """Nothing has ended: take back what was left word of."""
    if world.rank == 0 and (store := _store_of_starts()) is not None:
        with contextlib.suppress(RuntimeError):
            store.delete_key("vitruvius/ended")


def tell_end(code: int) -> None:
    """Let idle ranks know that this one ends, and how."""
    if _watched is not None:
        with contextlib.suppress(RuntimeError):
            _watched.compare_set("end", "", str(code))


def await_end() -> int:
    """The exit code of the ranks that are not idle, once one has ended."""
    assert _watched is not None
    while not _watched.check(["end"]):
        time.sleep(0.5)
    return int(_watched.get("end"))


_STORE_PATIENCE = 5.0
_met = 0  # the number of the try in which ranks have come together
_watched: dist.Store | None = None  # where idle ranks look


def _report_store(rank: int) -> dist.Store | None:
    """The launcher's store, else rank 0's, None if there is none (yet)."""
    host, port = _master()
    if dist.is_initialized() and not by_launcher():
        socket.create_connection((host, port), timeout=1).close()  # the store itself complains at length
        return dist.distributed_c10d._get_default_store()
    if rank == 0 and not by_launcher():
        return None
    return find_store(host, port, _STORE_PATIENCE)


def _attempt() -> str:
    """Which start of the ranks by their launcher this is; hosts may count differently until they have met."""
    return f"met {_met}" if _met else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _store_of_starts() -> dist.Store | None:
    """The launcher's store, if it starts ranks again after a failure and answers."""
    starts_again = by_launcher() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return find_store(*_master(), _STORE_PATIENCE) if starts_again else None


def by_launcher() -> bool:
    """Whether the launcher has the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _master() -> tuple[str, int]:
    """Where rank 0 is met: as the launcher says, else the first SLURM host and a port from the job's number."""
    port = os.environ.get("MASTER_PORT") or 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
    return os.environ.get("MASTER_ADDR") or _first_slurm_host(), int(port)


def _first_slurm_host() -> str:
    """Address of the first host of the job step, e.g. of `node[3-7,9]` or `a1,b2`; localhost outside SLURM.

    On one node it is where srun was called. Where a name means nothing to the resolver, `scontrol` knows its address.
    """
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher and int(os.environ.get("SLURM_NNODES", "1")) == 1:
        return launcher
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    first = re.split(r",(?![^\[]*\])", hosts)[0]  # at commas outside brackets
    name = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)
    return name if _resolves(name) else _slurm_address(name)


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _slurm_address(node: str) -> str:
    try:
        shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node
