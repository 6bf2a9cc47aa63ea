"""A rank's first moments, before torch is imported (which takes seconds): it ends with its launcher, and by signals,
but for a warning, which waits; its threads do not spin for long.

Imports nothing that takes time, so that what it promises holds from the start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # Linux
_SPINS = "10000"  # looks; a fraction of a millisecond


def end_with_launcher() -> None:
    """Have the kernel end this process when torchrun (or tools.launch) that started it ends, by whatever means.

    It does so while torch is imported and inside a collective too, where no code of ours would run. Other parents are
    let go: a run outlives the shell that started it, and SLURM ends what srun started. torchrun makes each rank the
    leader of a session, which tells it from what a rank may start in turn.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getsid(0) == os.getpid():
        end_with_parent()


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, whoever that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_by_interrupt() -> None:
    """Let an interrupt end this process without a traceback of imports, until `interrupts_raise`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupts_raise() -> None:
    """Python's own way again: KeyboardInterrupt. Ignored interrupts (of a shell's background jobs) stay ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hold_warnings() -> None:
    """Have a warning, SIGUSR1, wait until somebody heeds it: it asks for what may be done within minutes, and would end
    a process that has not come so far, or has done with it. Processes started meanwhile hold it, too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def let_warnings_come() -> None:
    """Those that wait come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def spin_briefly() -> None:
    """Have OpenMP threads that wait for others sleep soon, unless the environment says otherwise.

    libgomp, whose threads run torch's operations and the native kernels alike, reads this once, when torch loads it. By
    default a thread looks 300,000 times before it sleeps, for milliseconds. Beside another busy process it so keeps
    from a core the thread that it waits for, region after region; sleeping at once would slow a step that runs alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
