"""glibc's malloc, tuned for large temporaries."""

from . import native


def tune_allocator() -> bool:
    """Keeps large freed blocks in the process instead of returning them to the kernel, for the rest of the process's
    life.

    By default glibc maps each large tensor anew and every page of it is faulted in again at first touch, which costs
    more than
    most kernels that then fill it. The price is that peak memory is not handed back. Equivalent to starting with
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`. Returns whether it took effect: False where the native module is not
    built or the C library is not glibc.
    """
    return native.cpu is not None and bool(native.cpu.tune_allocator())
