"""torchrun with the exit code of the program it runs, and without its own tracebacks: `python -m tools.launch ARGS`.

Takes torchrun's arguments. torchrun itself ends with code 1 whatever its ranks said, prints a page of its own about
each, and gives every rank one thread; a batch script that must tell "wrong option" from "training diverged" starts
ranks with this (or with srun).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Run torchrun; returns the exit code of the rank that failed first, 128 + signal if it was killed, 0 if none
    failed.
    """
    _silence("torch.distributed.elastic")
    arguments = torchrun.parse_args(list(argv))
    try:
        share_cores(torchrun.determine_local_world_size(arguments.nproc_per_node))
        torchrun.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code: int = failure.exitcode
        if code < 0:
            print(f"tools.launch: rank {rank} was killed by signal {-code} ({failure.signal_name()})", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    except ValueError as error:
        print(f"tools.launch: error: {error}", file=sys.stderr)
        return 2
    return 0


def share_cores(ranks: int) -> None:
    """Give each of this host's ranks its share of the cores this process may use, unless OMP_NUM_THREADS is set."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def _silence(package: str) -> None:
    """Keep loggers below `package` quiet, also those that torch gave a level of their own."""
    for name in (package, *logging.Logger.manager.loggerDict):
        if f"{name}.".startswith(f"{package}."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
