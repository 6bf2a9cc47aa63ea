"""Runs a rank's main function so that every way of failing ends in one readable message and the right exit code.

Eight ranks that meet the same mistake say so once, whichever comes first. A rank that fails alone tells what happened
to it, and those that merely lose contact with it keep quiet. Nobody waits for a farewell: a failing rank leaves at
once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from data import BadSampleError, TooManyBadError, UnreadableImageError
from engine.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USAGE,
    FINAL,
    ConfigError,
    DivergedError,
    DriftError,
    OutputError,
)
from model.flops import without_compiler
from parallel import parent, process_group
from parallel.checkpoint.manifest import CheckpointError
from parallel.comm import PeerLostError
from parallel.process_group import World, read_world
from parallel.rendezvous import StartError
from parallel.slurm import NotATaskError

# What a rank that lost contact waits for the cause to be told: by the rank that failed, or by the launcher, which ends
# the others as soon as one is gone.
_GRACE_SECONDS = 3.0
_ASKS = {"-h", "--help", "--print_config"}  # what anybody may


def run_rank(
    main: Callable[[Sequence[str], World], int | None], argv: Sequence[str], program: str, *, alone: bool = False
) -> int:
    """Call `main(argv, world)`; returns the exit code of this rank (what `main` gives), or leaves where others may be
    waiting.

    Args:
        alone: this is work for one process: the batch script of a job of several tasks may do it.
    """
    world = World()
    try:
        parent.interrupts_raise()
        without_compiler()
        world = _read_world(alone or bool(_ASKS & set(argv)))
        if (ended := _ended_before(world)) is not None:
            again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "1"
            message = f"{program}: the run has ended with code {ended}, and is not tried again"
            return _leave(ended, world, message, told=True if again else None)
        code = main(argv, world)
        return _exit(EXIT_DONE if code is None else code, world)
    except SystemExit as error:  # --help
        code = error.code if isinstance(error.code, int) else EXIT_FAULT
        process_group.leave_word(code, world, told=False)
        return code
    except (ConfigError, BadSampleError, TooManyBadError) as error:
        return _leave(EXIT_USAGE, world, f"{program}: error: {error}")
    except (CheckpointError, DriftError, OutputError, UnreadableImageError) as error:
        return _leave(EXIT_FAULT, world, f"{program}: {error}")
    except DivergedError as error:
        return _leave(EXIT_DIVERGED, world, f"{program}: training diverged: {error}")
    except StartError as error:
        return _leave(error.code, world, f"{program}: {error}", told=error.told, lets_know=False)
    except PeerLostError as error:
        time.sleep(_GRACE_SECONDS)
        cause = re.sub(r"\[[^]]*\.cc:\d+\] ", "", str(error)).partition("\n")[0]
        return _leave(EXIT_FAULT, world, f"{program}: rank {world.rank} lost contact with another rank: {cause}")
    except KeyboardInterrupt:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # the launcher, who passed it on, tells
            return _exit(130, world)
        return _leave(130, world, f"{program}: interrupted")
    except Exception:
        return _leave(EXIT_FAULT, world, f"{program}: rank {world.rank} of {world.size} failed:\n{_traceback()}")


def _read_world(alone: bool) -> World:
    try:
        return read_world()
    except ValueError as error:
        if alone and isinstance(error, NotATaskError):
            return World()
        raise ConfigError(str(error)) from error


def _ended_before(world: World) -> int | None:
    """The exit code of ranks that the launcher has started again although another try would end alike, or is not
    wanted. Ranks that were stopped to share the work with those of another host, and now are more, go on.
    """
    noted = process_group.noted_end()
    if noted is None:
        return None
    code, ranks = noted
    if code == EXIT_STOPPED and world.size > ranks:
        process_group.forget_end(world)
        return None
    return code


def _traceback() -> str:
    return traceback.format_exc().rstrip()


def _leave(code: int, world: World, message: str, *, told: bool | None = None, lets_know: bool = True) -> int:
    """Tell why, unless another rank did (told; None: to be found out), and let ranks know that still wait for this one.
    With peers that may be inside a collective, skip the orderly shutdown that could wait for them.
    """
    sys.stdout.flush()
    note_for_torchrun(message)
    if told is None:
        told = not process_group.first_to_report("end", world)
    if not told:
        print(message, file=sys.stderr, flush=True)
    if lets_know:
        process_group.leave_word(code, world, told=True)
    return _exit(code, world)


def note_for_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its own page shows it as the cause.

    The form is that of torch.distributed.elastic's `record`, with our message in place of a traceback. Ranks that keep
    quiet leave it as well: torchrun shows the one that failed first, by its clock of whole seconds.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _exit(code: int, world: World) -> int:
    """Return the code, or, where there were process groups, end here.

    gloo's threads, still held by objects that only the interpreter's shutdown frees, now and then abort a process that
    has done all its work.
    """
    process_group.tell_end(code)
    if code in FINAL:
        process_group.note_end(code, world)
    if world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
