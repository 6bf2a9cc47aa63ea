"""The part of `python -m tools.benchmark peers --memory-limit ...` that knows of the limit.

On a CPU nothing ends a program at a limit, so its peak is measured: resident bytes above what imports take, of the rank
that takes most (tools.benchmark.resident). What takes more than the limit does not count, whatever its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.config import RecomputeConfig
from engine.errors import ConfigError
from tools.benchmark.peer_programs import Task
from tools.benchmark.table import Row

Peak = Callable[..., int]
"""(name of a program, task, system_malloc=False) -> bytes above imports that it takes, its allocator tuned or not."""

_MIB = 2**20
_TRIES, _HASTE = 4, 0.98  # what does not grow with the budget would have it come near the limit from above
_FSDP2 = ("fsdp2_recompute", "fsdp2")


def apply(wanted: str, task: Task, peak: Peak) -> tuple[int, Task]:
    """The limit in bytes, and the task with a policy of recomputation by which this engine keeps it.

    Args:
        wanted: a size, or auto. peak: as Peak.

    Raises:
        ConfigError: FSDP2 takes no less with its blocks computed again; or this engine cannot keep the limit.
    """
    limit = _between(task, peak) if wanted == "auto" else _bytes(wanted)
    return limit, _fitted(task, peak, limit) if task.flags != with_policy(task.flags) else task


def found(limit: int, task: Task) -> list[str]:
    """Options by which the same limit and budget are taken again without being looked for."""
    own = task.flags[task.flags.index("--recompute.policy") :] if "--recompute.policy" in task.flags else []
    return ["--memory-limit", str(limit), *own]


def with_policy(flags: Sequence[str], budget: int | str = "auto") -> list[str]:
    """The engine's flags, with the policy that chooses by a budget, unless they name one."""
    if any(flag.startswith("--recompute.policy") for flag in flags):
        return [*flags]
    return [*flags, "--recompute.policy", "auto", "--recompute.memory_budget", str(budget)]


def judge(rows: Sequence[Row], limit: int) -> list[Row]:
    """The rows with what they say of the limit; times over ours go where one of the two does not keep it."""
    keeps = [row["above_imports_MiB_per_rank"] * _MIB <= limit for row in rows]
    for row, kept in zip(rows, keeps, strict=True):
        if not kept:
            print(
                f"{row['program']} takes {row['above_imports_MiB_per_rank']:.0f} MiB, more than the limit of "
                f"{limit / _MIB:.0f}: it does not count"
            )
    over = ("time_over_vitruvius", "lower_quartile", "upper_quartile")
    return [
        {
            **row,
            **({} if kept and keeps[0] else dict.fromkeys(over)),
            "memory_limit_MiB": limit / _MIB,
            "within_limit": kept,
        }
        for row, kept in zip(rows, keeps, strict=True)
    ]


def _bytes(text: str) -> int:
    try:
        return RecomputeConfig(policy="auto", memory_budget=text).budget(0)
    except ValueError as error:
        raise ConfigError(str(error).replace("recompute.memory_budget", "--memory-limit")) from error


def _between(task: Task, peak: Peak) -> int:
    """Half way between what FSDP2 takes when its blocks are computed again, and when they are not. It could do without
    that by a slower allocator, too, so the lesser of both counts.
    """
    low, fast = (peak(name, task) for name in _FSDP2)
    slow = peak(_FSDP2[1], task, system_malloc=True)
    print(
        f"FSDP2 takes {fast / _MIB:.0f} MiB per rank, {slow / _MIB:.0f} with glibc's allocator as it is, and "
        f"{low / _MIB:.0f} with its blocks computed again"
    )
    high = min(fast, slow)
    if low >= high:
        raise ConfigError(
            f"--memory-limit auto: computing blocks again saves FSDP2 nothing here ({low / _MIB:.0f} MiB against "
            f"{high / _MIB:.0f}): take a larger batch or model, add --system-malloc, or give a size"
        )
    return (low + high) // 2


def _fitted(task: Task, peak: Peak, limit: int) -> Task:
    """A budget is of tensors; beside them a process has holes in its heap, and buffers of libraries. So it is lowered
    by what the process takes too much.
    """
    budget = limit
    for _ in range(_TRIES):
        if budget <= 0:
            break
        tried = replace(task, flags=with_policy(task.flags, budget))
        taken = peak("vitruvius", tried)
        print(f"recompute.memory_budget {budget}: {taken / _MIB:.0f} MiB of {limit / _MIB:.0f}")
        if taken <= limit:
            return tried
        budget = int(_HASTE * budget * limit / taken)
    raise ConfigError(f"--memory-limit {limit}: this engine takes more with every budget that was tried")
