"""Who this process is among the ranks, and the process group of them all: its start, its end, who reports a failure."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel import departure, slurm
from parallel.departure import Word
from parallel.heartbeat import Signs
from parallel.rendezvous import HOW, Place, find_store, first_on_host, meet, open_store


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


def read_world(environ: Mapping[str, str] | None = None) -> World:
    """Rank and world size from torchrun's variables, else SLURM's (`srun`), else one process.

    Raises:
        ValueError: variables of a launcher are missing, or make no sense; or this is one of several processes of a
            launcher that is not understood, and would train alone.
        parallel.slurm.NotATaskError: this is not one of the job's tasks, but its batch script.
    """
    env = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = slurm.task(env) if "RANK" not in env else None
    if found is None and (names[0] in env or names[1] in env):
        found = _told(env, names)
    rank, size, local_rank, local_size = found or (0, 1, 0, 1)
    if not 0 <= rank < size:
        raise ValueError(f"the launcher's variables say rank {rank} of {size}: ranks are numbered from 0")
    for other in _OTHERS if "RANK" not in env else ():
        if env.get(other, "1") not in ("1", str(size)):
            raise ValueError(f"this is one of {env[other]} processes ({other}), and none has a rank: {HOW}, not mpirun")
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def _told(env: Mapping[str, str], names: Sequence[str]) -> tuple[int, int, int, int]:
    try:
        rank, size, local_rank = (int(env[name]) for name in names[:3])
        return rank, size, local_rank, int(env.get(names[3], "1"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"the launcher's variables {', '.join(names[:3])} must all be integers: {error}") from error


def start(world: World, device: torch.device, timeout_seconds: float) -> None:
    """Make the process group: NCCL for CUDA, gloo for the CPU. One process makes none; idle ranks only come together.

    Under srun, MASTER_ADDR and MASTER_PORT default to the first host of the job and a port from the job's number.

    Raises:
        parallel.rendezvous.StartError: not all ranks have come in time.
    """
    global _come, _met, _watched
    if world.size + world.idle == 1:
        return
    place = _place(world)
    os.environ.update(MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
    _come = True
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


def first_to_report(kind: str, world: World) -> bool:
    """Whether this rank is the first to report a `kind` of failure; so that one message, not one per rank, reaches the
    user. Works before the process group is made, too, and is meant for ranks that are about to end.

    Ranks agree through a key-value store: that of the launcher, which outlives every rank, else that of rank 0. While
    rank 0 has not opened one, it speaks for itself, and opens one to leave word; the others give it `_STORE_PATIENCE`
    seconds. If it is gone, or slow, one of each host reports.
    """
    try:
        store = _report_store(world.rank)
        if store is None:
            return world.rank == 0 or first_here_to_report(kind, world)
        if not _met and not by_launcher():
            departure.await_open(words := dist.PrefixStore("vitruvius", store))
            if (word := departure.left(words)) is not None and word.told:
                return False
        return bool(store.add(f"vitruvius/{_attempt()}/{kind}", 1) == 1)
    except Exception:  # whatever is wrong with the store must not hide the failure itself
        return True


def first_here_to_report(kind: str, world: World) -> bool:
    """The same among the ranks of this host, which needs no store."""
    return first_on_host(replace(_place(world), run=f"{_attempt()} {kind}")) is not None


def leave_word(code: int, world: World, *, told: bool) -> None:
    """This rank ends, maybe before all have met: those that wait for it then end, too, with this code. Where a launcher
    ends the others nothing is done.

    Args:
        told: it has said why.
    """
    size = world.size + world.idle
    if size == 1 or by_launcher() or _met:
        return
    seconds = departure.LINGER_SECONDS if code != _INTERRUPTED else 1.0  # so are the others, by who waits for all
    with contextlib.suppress(Exception, KeyboardInterrupt):
        place = _place(world)
        opens = place.hosts and not _come
        store = open_store(place, seconds) if opens else find_store(place.host, place.port, seconds)
        if store is None:
            return
        store = dist.PrefixStore("vitruvius", store)
        departure.leave(store, Word(rank=world.rank, code=code, told=told))
        if opens:
            departure.say_open(store)
        if place.hosts:
            departure.await_all(store, size, seconds)


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


_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of Open MPI, and of MPICH and its kin
_STORE_PATIENCE = 5.0
_INTERRUPTED = 130
_come = False  # whether this rank has gone to meet the others
_met = 0  # the number of the try in which ranks have come together
_watched: dist.Store | None = None  # where idle ranks look


def _place(world: World) -> Place:
    host, port = _master()
    hosts = world.rank == 0 and not by_launcher()
    return Place(host=host, port=port, rank=world.rank, size=world.size + world.idle, hosts=hosts, run=_attempt())


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
    """Where rank 0 is met: as the launcher says, else the first SLURM host and a port from the numbers of the step."""
    return os.environ.get("MASTER_ADDR") or slurm.first_host(), int(os.environ.get("MASTER_PORT") or slurm.port())
