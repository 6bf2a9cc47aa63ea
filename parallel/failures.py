"""What can go wrong between ranks, told apart: a peer that is gone, ranks that do different things, and one's own."""

from __future__ import annotations

import re

import torch.distributed as dist

_GLOO = re.compile(r"gloo/transport|pair closure")  # the latter after a time-out that was told before
# Complaints of a backend that are about this rank's own call, or its own GPU.
_OWN = re.compile(r"enforce fail|nccl(UnhandledCudaError|InternalError|InvalidArgument|InvalidUsage)")


class PeerLostError(RuntimeError):
    """A collective failed because another rank died, raised, or never came."""


class MismatchError(RuntimeError):
    """Ranks that should be at the same operation are at different ones, or at one with other sizes."""


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error out of a collective is about another rank that is gone or late.

    Anything can be raised while a collective waits, by signal handlers too: a data worker that was killed, for one.
    NCCL's complaints and the store's have a type; gloo's have none, but name the place in its transport.
    """
    if isinstance(error, PeerLostError):
        return True
    by_backend = isinstance(error, dist.DistError) or _GLOO.search(str(error)) is not None
    return by_backend and not _OWN.search(str(error))
