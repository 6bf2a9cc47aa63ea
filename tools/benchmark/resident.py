"""Memory of this process as the kernel counts it: what is resident, the most that ever was, and the most of a while.

The allocator keeps what is freed, so what is resident after a step says nothing of the next: to see what one step
takes, free memory is given back first and the kernel's mark of the most is set to what is left
(proc_pid_clear_refs(5)).
"""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TO_NOW = "5"  # what clear_refs takes to set the mark of the most to what is resident now


def resident_bytes(field: str = "VmRSS") -> int:
    """VmRSS is what is resident now, VmHWM the most that ever was, RssShmem shared memory (proc_pid_status(5))."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def forget_peak() -> int:
    """Count the most there ever was anew, where that is allowed; else it is that of all so far. Returns what is
    resident now.
    """
    with suppress(OSError):
        _CLEAR.write_text(_TO_NOW)
    return resident_bytes()


def give_back() -> int:
    """Return free memory to the kernel, and forget the most there ever was; returns what is resident now."""
    from model import kernels  # here, since programs without this engine's libraries count what is resident, too

    gc.collect()
    kernels.give_back()
    _CLEAR.write_text(_TO_NOW)
    return resident_bytes()
