"""torchrun with the exit code of the program it runs, and without its own tracebacks: `python -m tools.launch ARGS`.

Takes torchrun's arguments. torchrun itself ends with code 1 whatever its ranks said, prints a page of its own about
each, gives every rank one thread, leaves a folder behind and hears hang-ups through nohup; a batch script that must
tell "wrong option" from "training diverged" starts ranks with this (or with srun).

SIGTERM, SIGUSR1 and SIGINT are passed on once, and ranks that train then save and end with code 3, which is ours as
well; they have --shutdown-timeout seconds for it, here 600. A second signal ends them at once. SIGUSR1, which warns
of an end to come, ends nobody who has just begun: launcher and ranks heed it when they can. With --max-restarts
ranks are started again after a failure, but not where another try would end alike: codes 2, 3 and 4.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from parallel import parent

if __name__ == "__main__":  # before the imports below, which take seconds
    parent.hold_warnings()

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
from torch.distributed.launcher import api as launcher

from engine.errors import EXIT_STOPPED
from tools.agent import Agent, Stopped, ending, first_failure

_SHUTDOWN_SECONDS = 600  # a large state on a slow disk
_MOST_RANKS = 1024  # of one host: none has so many cores or GPUs


def main(argv: Sequence[str]) -> int:
    """Run torchrun; returns the exit code of the rank that failed first, 128 + signal if it (or the launcher) was
    ended by one, 3 if ranks saved before they ended so, 2 for wrong arguments, 1 if the ranks could not be started, 0
    if none failed.
    """
    _silence("torch.distributed.elastic")
    arguments = torchrun.parse_args(list(argv))
    others = _children()
    try:
        share_cores(_checked_ranks(arguments))
        _leave_no_folder(arguments)
        _heed_signals(arguments)
        _miss_hosts_soon(arguments)
        launcher.LocalElasticAgent, Agent.say = Agent, staticmethod(_say)  # type: ignore[misc]
        torchrun.run(arguments)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if how := ending(rank, failure):
            _say(how)
        code: int = failure.exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        for name in filter(None, arguments.signals_to_handle.split(",")):
            signal.signal(signal.Signals[name], signal.SIG_IGN)  # it is over
        _end(_children() - others)
        return _code_after(signal.Signals(error.sigval), error.codes if isinstance(error, Stopped) else [None])
    except RendezvousConnectionError:
        _say(
            f"error: no answer from the launcher that has the store ({arguments.rdzv_endpoint}): it has ended, or its "
            "host or the link to it is down"
        )
        return 1
    except (RendezvousError, RuntimeError) as error:
        _say(f"error: the launchers of {arguments.nnodes} host(s) could not start ranks: {_first_line(error)}")
        return 1
    except (ValueError, AssertionError, OSError) as error:
        _say(f"error: {_first_line(error)}")
        return 2
    return 0


def _code_after(stopped_by: signal.Signals, codes: Collection[int | None]) -> int:
    """Our exit code after a signal, by those of the ranks; None: one had not ended."""
    ended = {code for code in codes if code}
    told = f"stopped by signal {stopped_by.value} ({stopped_by.name})"
    if None not in codes and ended <= {EXIT_STOPPED}:
        return max(ended, default=0)
    if -signal.SIGKILL in ended:
        _say(f"{told}; ranks that did not end in time (--shutdown-timeout) were killed")
        return 128 + signal.SIGKILL
    failed = ended - {EXIT_STOPPED, 128 + stopped_by}
    if None in codes or not failed or min(failed) < 0:
        _say(told)
        return 128 + stopped_by
    return max(failed)


def _checked_ranks(arguments: argparse.Namespace) -> int:
    """Ranks of this host. Raises ValueError where they, or the nodes, cannot be so many."""
    ranks = torchrun.determine_local_world_size(arguments.nproc_per_node)
    if not 1 <= ranks <= _MOST_RANKS:
        raise ValueError(f"--nproc-per-node is {ranks}: give the ranks of this host, 1 to {_MOST_RANKS}")
    try:
        fewest, most = torchrun.parse_min_max_nnodes(arguments.nnodes)
    except (ValueError, RuntimeError):
        raise ValueError(f"--nnodes is {arguments.nnodes!r}: give a number of hosts, or MIN:MAX") from None
    if not 1 <= fewest <= most:
        raise ValueError(f"--nnodes is {arguments.nnodes}: give a number of hosts from 1, or MIN:MAX with MIN <= MAX")
    if arguments.rdzv_backend == "static" and most > 1 and not 0 <= arguments.node_rank < most:
        raise ValueError(f"--node-rank is {arguments.node_rank}: hosts are numbered 0 to {most - 1} (--nnodes {most})")
    if not arguments.monitor_interval >= 0:
        raise ValueError(f"--monitor-interval is {arguments.monitor_interval}: give seconds between looks at the ranks")
    return ranks


def _leave_no_folder(arguments: argparse.Namespace) -> None:
    """Have torch make no folder for logs, unless something is to be written there."""
    logs = ("log_dir", "local_ranks_filter", "duplicate_stdout_filters", "duplicate_stderr_filters", "logs_specs")
    if arguments.redirects == arguments.tee == "0" and not any(getattr(arguments, name) for name in logs):
        arguments.log_dir = os.devnull


def _heed_signals(arguments: argparse.Namespace) -> None:
    """Pass on what asks ranks to stop, and give them time. Signals that whoever started us wants ignored (nohup, a
    shell's background jobs) stay ignored.
    """
    if arguments.shutdown_timeout is None and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        arguments.shutdown_timeout = _SHUTDOWN_SECONDS
    names = [name.strip() for name in arguments.signals_to_handle.split(",")]
    if arguments.signals_to_handle == torchrun.get_args_parser().get_default("signals_to_handle"):
        names.append("SIGUSR1")
    unknown = [name for name in names if name not in signal.Signals.__members__]
    if unknown:
        raise ValueError(f"--signals-to-handle: {', '.join(unknown)} is no signal of this system")
    heeded = [name for name in names if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN]
    if "SIGUSR1" not in heeded:
        parent.let_warnings_come()
    arguments.signals_to_handle = ",".join(heeded)


def _miss_hosts_soon(arguments: argparse.Namespace) -> None:
    """Have a lost host given up after 9 s without a sign of life, not 15; the others cannot go on before. With 3 s a
    launcher that was kept from a processor for so long was given up, and the other trained on without it.
    """
    if arguments.rdzv_backend != "static" and "keep_alive_interval" not in arguments.rdzv_conf:
        arguments.rdzv_conf = ",".join(filter(None, (arguments.rdzv_conf, "keep_alive_interval=3")))


def _children() -> set[int]:
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:  # not every kernel has it
        return set()


def _end(ranks: set[int]) -> None:
    """End ranks that torch does not know of: a signal that comes while it starts them interrupts its list."""
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def share_cores(ranks: int) -> None:
    """Give each of this host's ranks its share of the cores this process may use, unless OMP_NUM_THREADS is set."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def _silence(package: str) -> None:
    """Keep loggers below `package` quiet, also those that torch gave a level of their own."""
    for name in (package, *logging.Logger.manager.loggerDict):
        if f"{name}.".startswith(f"{package}."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _say(message: str) -> None:
    print(f"tools.launch: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # torch's threads, which wait for files of ranks, are not waited for
