"""A rank that ends before all ranks have met leaves word, so that those who wait for it end too.

Only where no launcher ends the others, as under srun. The word lies in rank 0's store; if rank 0 itself leaves, it has
one open until the others have come for it; another rank stays until rank 0 has opened it. Who is killed leaves none, or
meets nobody in LINGER_SECONDS: the roll call finds out, in its time.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

LINGER_SECONDS = 60.0  # for rank 0's store, or for ranks that come later: they may be at their imports
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Word:
    """Who left first, and with which exit code. told: it has said why."""

    rank: int
    code: int
    told: bool


def leave(store: dist.Store, word: Word) -> None:
    """For whoever is there, or comes; the first word counts."""
    store.compare_set("left", "", json.dumps(asdict(word)))
    heed(store)


def left(store: dist.Store) -> Word | None:
    """The word, if there is one."""
    return Word(**json.loads(store.get("left"))) if store.check(["left"]) else None


def heed(store: dist.Store) -> None:
    """This rank knows, and goes."""
    store.add("gone", 1)


def await_all(store: dist.Store, size: int, seconds: float) -> None:
    """Keep the store open until all ranks have gone, this one among them."""
    deadline = time.monotonic() + seconds
    while store.add("gone", 0) < size and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def say_open(store: dist.Store) -> None:
    """Rank 0 has opened the store, and if it leaves, has said so."""
    store.set("open", "")


def await_open(store: dist.Store) -> None:
    """Raises torch.distributed.DistStoreError where that takes too long."""
    store.wait(["open"])
