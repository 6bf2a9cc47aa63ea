"""Timing on a machine that others also use: alternatives are interleaved, and compared by medians of ratios."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Fn = Callable[[], object]
Times = dict[str, list[float]]


def interleaved(alternatives: dict[str, Fn], repeats: int, device: torch.device) -> Times:
    """Seconds of each call, alternatives taking turns, after two warm-up rounds. CUDA work is waited for.

    With one thread on a CPU these are CPU seconds, which other programs on the same cores disturb less.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def timed(fn: Fn) -> float:
        start = clock()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    for _ in range(2):
        for fn in alternatives.values():
            timed(fn)
    rounds = [{name: timed(fn) for name, fn in alternatives.items()} for _ in range(repeats)]
    return {name: [r[name] for r in rounds] for name in alternatives}


def ratio(times: Times, a: str, b: str) -> float:
    """Median over rounds of time(a) / time(b): how many times faster b is than a."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper; of one value that value."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, high


def milliseconds(times: Times, name: str) -> float:
    return 1e3 * statistics.median(times[name])
