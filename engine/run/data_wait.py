"""Whether steps wait for data, what it is that takes so long, and how many workers would cure it.

Every rank measures its own: how long it waited, and what making its micro-batches was, in workers or in its own
process. The figures ride in the one collective of a line of metrics, so any rank that starves is told of, by rank 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from data import TrainStream
from engine.run.agreement import named_ranks

STARVED = 0.1
"""Share of a step from which on waiting for data is told."""

_OTHER = 1.5  # factor by which a number of workers is another one, which is told again


class Figures(NamedTuple):
    """Of a rank; seconds per step, without the first of an attempt, which begins with workers that begin.

    Attributes:
        step: in all. waited: for micro-batches. transferred: the device waited for copies that were on their way.
        reading, making: as of data.Work, of all workers together. cores: that workers may have.
    """

    step: float = 0.0
    waited: float = 0.0
    transferred: float = 0.0
    reading: float = 0.0
    making: float = 0.0
    cores: float = 1.0

    @property
    def lost(self) -> float:
        """Seconds of a step without data."""
        return self.waited + self.transferred

    @property
    def work(self) -> float:
        """Seconds that making a step's micro-batches takes."""
        return self.reading + self.making

    @property
    def starves(self) -> bool:
        """Whether that is worth a word: of a rank that makes micro-batches, and does not wait for one that does."""
        return self.lost > STARVED * self.step and self.work > 0


class Supply:
    """What this rank waits for.

    Args:
        local_size: ranks that share the cores of this host.
    """

    def __init__(self, stream: TrainStream, local_size: int) -> None:
        self._stream = stream
        self._cores = max(1, len(os.sched_getaffinity(0)) // local_size - 1)  # but for the one of the rank itself
        self._steps = -1
        self._begin()

    def after_step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps += 1
        if self._steps == 0:
            self._begin()
            return
        self._seconds += seconds

    def figures(self, late: float) -> Figures:
        """Since the last call, in whose steps the device has waited so long for copies on average."""
        if self._steps <= 0:
            return Figures()
        work, waited = self._stream.work - self._work, self._stream.waited - self._waited
        step, waited, reading, making = (
            each / self._steps for each in (self._seconds, waited, work.reading, work.making)
        )
        found = Figures(step, waited, late, reading, making, self._cores)
        self._steps = 0
        self._begin()
        return found

    def _begin(self) -> None:
        self._seconds, self._waited, self._work = 0.0, self._stream.waited, self._stream.work


class Hints:
    """What is told of ranks that starve, once, and again when it is something else.

    Args:
        workers: of each rank, `data.workers`.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._told: tuple[str, int] | None = None

    def of(self, ranks: Sequence[Figures]) -> str | None:
        """A line, or nothing that is new. `ranks`: of each, by its number."""
        starved = [rank for rank, figures in enumerate(ranks) if figures.starves]
        if not starved:
            return None
        worst = ranks[max(starved, key=lambda rank: ranks[rank].lost)]
        cause, wanted = bottleneck(worst), workers_for(worst)
        if self._told is not None and cause == self._told[0]:
            less, more = sorted((wanted, self._told[1]))
            if more < _OTHER * less:
                return None
        self._told = cause, wanted
        return (
            f"data: {100 * worst.lost / worst.step:.0f} % of a step is waiting for images ({named_ranks(starved)}); "
            f"{_described(worst, cause, self._workers)}: {_cure(worst, cause, wanted, self._workers)}"
        )


def bottleneck(of: Figures) -> str:
    """`transfer`, `read` or `decode`: what takes longest of that which is waited for."""
    if of.transferred > of.waited:
        return "transfer"
    return "read" if of.reading > of.making else "decode"


def workers_for(of: Figures) -> int:
    """How many would make a step's micro-batches in the time that it takes without waiting, had they cores enough."""
    return math.ceil(of.work / max(of.step - of.lost, 1e-3 * of.step))


def _most(of: Figures, wanted: int) -> int:
    """As many of these as the cores feed: who waits for a disk needs none."""
    return max(1, min(wanted, int(of.cores * of.work / max(of.making, 1e-9))))


def _described(of: Figures, cause: str, workers: int) -> str:
    if cause == "transfer":
        return f"the bottleneck is transfer, copies to the device are late by {1e3 * of.transferred:.0f} ms a step"
    who = f"{workers} worker{'s' * (workers > 1)}" if workers else "the training process"
    seconds = {"decode": of.making, "read": of.reading}
    other = "read" if cause == "decode" else "decode"
    return (
        f"the bottleneck is {cause}, {1e3 * seconds[cause]:.0f} ms a step of {who} ({other} {1e3 * seconds[other]:.0f})"
    )


def _cure(of: Figures, cause: str, wanted: int, workers: int) -> str:
    if cause == "transfer":
        return "workers would not help, smaller micro-batches or fewer pixels may"
    most, cores = _most(of, wanted), f"this rank's {of.cores:.0f} core{'s' * (of.cores > 1)}"
    if most < wanted:
        fewer = "cheaper augmentation or smaller files" if of.making > of.reading else "a quicker disk"
        if most > workers:
            return f"{wanted} workers would keep up, {cores} feed {most}: set data.workers {most}; {fewer} would help"
        return f"{wanted} workers would keep up, more than {cores} feed: {fewer} would help"
    if wanted <= workers:
        slow = "files that are slow now and then" if cause == "read" else "cores that others use, too"
        return f"data.workers {workers} should be enough, so it is {slow}"
    return f"data.workers {wanted} would keep up"
