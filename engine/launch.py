"""Runs a rank's main function so that every way of failing ends in one readable message and the right exit code.

Eight ranks that meet the same mistake say so once (rank 0). A rank that fails alone tells what happened to it; those
that merely lose contact with it keep quiet. Nobody waits: a failing rank leaves at once, without a farewell to the
others.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from engine.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_FAULT, EXIT_USAGE, ConfigError, DivergedError
from parallel import comm
from parallel.comm import PeerLostError, World, read_world


def run_rank(main: Callable[[Sequence[str], World], None], argv: Sequence[str], program: str) -> int:
    """Call `main(argv, world)`; returns the exit code of this rank, or leaves the process where others may be
    waiting.
    """
    world = World()
    try:
        world = read_world()
        main(argv, world)
        return EXIT_DONE
    except SystemExit as error:  # --help
        return error.code if isinstance(error.code, int) else EXIT_FAULT
    except ConfigError as error:
        if world.rank == 0:
            _tell(f"{program}: error: {error}")
        return _leave(EXIT_USAGE, world)
    except DivergedError as error:
        if world.rank == 0:
            _tell(f"{program}: training diverged: {error}")
        return _leave(EXIT_DIVERGED, world)
    except PeerLostError as error:
        if comm.first_to_report("lost_peer", world.rank):
            _tell(f"{program}: rank {world.rank} lost contact with another rank and stops. {error}")
        return _leave(EXIT_FAULT, world)
    except KeyboardInterrupt:
        return _leave(130, world)
    except Exception as error:
        if comm.first_to_report("fault", world.rank):
            _tell(f"{program}: rank {world.rank} of {world.size} failed:\n{traceback.format_exc()}")
        else:
            _tell(f"{program}: rank {world.rank} failed too: {type(error).__name__}: {error}".partition("\n")[0])
        return _leave(EXIT_FAULT, world)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _leave(code: int, world: World) -> int:
    """With peers that may be inside a collective, skip the orderly shutdown that could wait for them."""
    if world.size > 1:
        sys.stdout.flush()
        os._exit(code)
    return code
