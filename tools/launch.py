"""torchrun with the exit code of the program it runs, and without its own tracebacks: `python -m tools.launch ARGS`.

Takes torchrun's arguments. torchrun itself ends with code 1 whatever its ranks said, and prints a page of its own
about each; a batch script that must tell "wrong option" from "training diverged" starts ranks with this (or with
srun).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Run torchrun; returns the exit code of the rank that failed first, 128 + signal if it was killed, 0 if none
    failed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args(list(argv)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code: int = failure.exitcode
        if code < 0:
            print(f"rank {rank} was killed by signal {-code}", file=sys.stderr)
        return code if code >= 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
