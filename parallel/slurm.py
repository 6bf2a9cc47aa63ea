"""What SLURM tells a process in variables: which of a step's tasks it is, and where the first of them is."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping

_TASKS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")


class NotATaskError(ValueError):
    """This process belongs to a job of several tasks, and is none of them."""


def task(env: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """(rank, ranks, rank on this host, ranks of this host) of one of the tasks that srun has started; None where there
    is but one, or no SLURM.

    A batch script has the job's variables and number 0, as the first task has, but none of a step. Nor has the shell of
    salloc, which may be one task itself that is told of the whole job; and what is submitted from a task's shell has
    those of that step. Then a step's tasks are not as many as those that are wanted.

    Raises:
        NotATaskError: see there. ValueError: a variable is missing, or makes no sense.
    """
    numbers = {name: env[name] for name in _TASKS if name in env}
    try:
        wanted = tasks_of_job(env)
        here = _of_hosts(env.get("SLURM_STEP_TASKS_PER_NODE"))
        if wanted <= 1:
            return None
        if sum(here) != wanted:
            raise NotATaskError(
                f"this is the batch script or the shell of a job of {wanted} tasks, not one of them: start with srun "
                "or torchrun (one process alone with srun --ntasks 1)"
            )
        return int(env["SLURM_PROCID"]), wanted, int(env["SLURM_LOCALID"]), here[int(env.get("SLURM_NODEID", "0"))]
    except NotATaskError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"SLURM's variables {', '.join(_TASKS)} make no sense together: {numbers}") from error


def tasks_of_job(env: Mapping[str, str]) -> int:
    """How many tasks a job is for, 0 outside SLURM. Raises ValueError where a variable makes no sense."""
    return int(env["SLURM_NTASKS"]) if "SLURM_NTASKS" in env else sum(_of_hosts(env.get("SLURM_TASKS_PER_NODE")))


def _of_hosts(text: str | None) -> list[int]:
    """Tasks of each host: [4, 4, 3] of `4(x2),3`."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in (text or "").split(",") if part]
    if not all(parts):
        raise ValueError(text)
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def port() -> int:
    """For the ranks of a step to meet at, alike on all of them; steps of a job that run at once have others."""
    job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (job + 101 * step) % 20000


def first_host() -> str:
    """Address of the first host of the job step, e.g. of `node[3-7,9]` or `a1,b2`; localhost outside SLURM, and where
    all tasks of the step are on one host. Where a name means nothing to the resolver, `scontrol` knows its address.

    SLURM_LAUNCH_NODE_IPADDR is where srun was called: a login node, or another node of a larger job.
    """
    if len(_of_hosts(os.environ.get("SLURM_STEP_TASKS_PER_NODE"))) == 1:
        return "127.0.0.1"
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    first = re.split(r",(?![^\[]*\])", hosts)[0]  # at commas outside brackets
    name = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)
    return name if _resolves(name) else _address(name)


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _address(node: str) -> str:
    try:
        shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node
