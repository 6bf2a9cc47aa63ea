"""Where the memory of CPU tensors comes from, and glibc's malloc for what is no tensor."""

import ctypes
import os
import sys
from contextlib import suppress

import torch

from . import native


def tune_allocator() -> bool:
    """Keeps large freed blocks in the process instead of returning them to the kernel, for the rest of the process's
    life.

    By default glibc maps each large tensor anew and every page of it is faulted in again at first touch, which costs
    more than most kernels that then fill it. Tensors come from a pool (`use_pool`); where that cannot be, from glibc's
    heap, whose holes come on top. Other memory stays in that heap. Returns whether glibc was told (as
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` do at the start): False where the native module is not built or the C
    library is not glibc.
    """
    use_pool()
    return native.cpu is not None and bool(native.cpu.tune_allocator())


def use_pool() -> bool:
    """From now on CPU tensors of 64 KiB or more are made of pages that this process keeps, no more of them than were
    once in use at the same time (`csrc/memory/pool.h`), whichever thread makes or frees them.

    Returns whether that is so; `pool_state` says why it is not.
    """
    return not _why_no_pool() and bool(native.memory is not None and native.memory.install())


def pool_state() -> str:
    """Of the memory of CPU tensors, for a report."""
    why = _why_no_pool()
    return f"glibc's heap ({why})" if why else "a pool of pages"


def _why_no_pool() -> str:
    if os.environ.get("VITRUVIUS_POOL") == "0":
        return "VITRUVIUS_POOL=0"
    if native.memory is None:
        return f"the memory module cannot be used: {native.memory_error}; {native.HOW_TO_BUILD}"
    if native.memory.sanitized:
        return "built with AddressSanitizer"
    built = native.memory.torch_version
    return "" if built == torch.__version__ else f"built for torch {built}, this is {torch.__version__}"


def most_in_pool() -> int | None:
    """Bytes, in whole pages, that the pool's tensors had at most at once since `give_back`; None without a pool."""
    return None if _why_no_pool() or native.memory is None else int(native.memory.counts()["held"])


def give_back() -> None:
    """Returns to the kernel what is free, of the pool and of glibc's heap."""
    if native.memory is not None:
        native.memory.trim()
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)
