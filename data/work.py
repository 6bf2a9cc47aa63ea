"""How long it takes to make what a micro-batch is of: waiting for bytes of files apart from all that is made of them.

Who reads bytes says so (`reading_bytes`), and whoever wants to know listens (`timed`), in the same process and thread,
a worker or not. Where nobody listens that costs a look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True)
class Work:
    """Seconds that processes were busy with samples.

    Attributes:
        reading: until bytes of files were there. making: decoding, augmenting, tokens of texts.
    """

    reading: float = 0.0
    making: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.reading + other.reading, self.making + other.making)

    def __sub__(self, other: Work) -> Work:
        return Work(self.reading - other.reading, self.making - other.making)


NO_WORK = Work()


class _Clock:
    reading = 0.0


_LISTENS = ContextVar[_Clock | None]("who is timed", default=None)


def timed(make: Callable[[], Made]) -> tuple[Made, Work]:
    """What is made, and the work that it was."""
    clock, began = _Clock(), time.perf_counter()
    before = _LISTENS.set(clock)
    try:
        made = make()
    finally:
        _LISTENS.reset(before)
    return made, Work(clock.reading, time.perf_counter() - began - clock.reading)


@contextmanager
def reading_bytes() -> Iterator[None]:
    """Bytes of a file are waited for."""
    clock, began = _LISTENS.get(), time.perf_counter()
    try:
        yield
    finally:
        if clock is not None:
            clock.reading += time.perf_counter() - began
