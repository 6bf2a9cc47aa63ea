"""How the ranks of an axis come to share memory, or find out that they cannot."""

from __future__ import annotations

import os
from contextlib import suppress

from parallel import comm, host
from parallel.comm import Axis
from parallel.host import Memory


def share(axis: Axis, nbytes: int) -> Memory | None:
    """Memory for the ranks of an axis, None if they are not to use it, or are not processes of one host that see each
    other. Collective; nbytes: the same on all ranks.
    """
    if not axis.shares:
        return None
    token, path, fd = os.urandom(16).hex(), "", -1
    identity = host.identity() if host.is_supported() else None
    if identity is not None and axis.index == 0:
        with suppress(OSError):  # a sandbox may forbid it
            path, fd = host.offer(nbytes, token)
    infos = comm.gather_objects((identity, os.getpid(), path, token), axis)
    memory = None
    if identity is not None and len({info[0] for info in infos}) == 1:
        pids = [info[1] for info in infos]
        try:
            memory = Memory(infos[0][2], nbytes, axis.index, pids, axis.timeout, infos[0][3], spins=axis.spins)
        except (OSError, ValueError):  # containers with process numbers of their own: another's memory, or none
            memory = None
    opened = comm.gather_objects(memory is not None, axis)
    if fd >= 0:
        os.close(fd)
    return memory if all(opened) else None
