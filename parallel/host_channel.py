"""Collectives of CPU ranks on one host through shared memory: a copy in and a copy out, where gloo goes through TCP.

For the ranks of an axis that are processes of one host: 7 MB gathered by two ranks take 0.6 ms so, 8 ms by gloo.

Each rank has a few slots in memory that all of them map, and two counters: of the operations it has *deposited* its
data for, and of those it has *collected*. An operation deposits when it is started and collects when it is waited for,
so nobody waits for the others before he needs their data; a slot is used again when all have collected from it. What
does not fit into a slot is done in rounds while it is started. Both ways the rank that is farthest behind finds all it
needs, so nothing can lock up that would not lock up with any other transport. A slot begins with a label, which
operation it is for and how long that is: ranks that are at different ones get an error that names both.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from parallel.failures import MismatchError
from parallel.host import LINE, Memory, counted, reached

SLOT_BYTES = 4 << 20
SLOTS = 2

Collect = Callable[[Sequence[Tensor]], None]


def channel_bytes(size: int) -> int:
    """The memory of an axis of `size` ranks."""
    return size * (2 * LINE + SLOTS * (LINE + SLOT_BYTES))


class Channel:
    """An axis's collectives, as one rank takes part in them, in memory of `channel_bytes`."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.index, self.size = memory, memory.index, memory.size
        self._deposited = [memory.word(2 * rank * LINE) for rank in range(self.size)]
        self._collected = [memory.word((2 * rank + 1) * LINE) for rank in range(self.size)]
        self._next = 0
        self._started: deque[Operation] = deque()

    def slot(self, rank: int, number: int) -> Tensor:
        """The bytes in which `rank` deposits for operation `number`."""
        start = self._label(rank, number).stop
        return self.memory.bytes[start : start + SLOT_BYTES]

    def _label(self, rank: int, number: int) -> slice:
        """Where in the memory `rank` says what its operation `number` is."""
        start = self.size * 2 * LINE + (rank * SLOTS + number % SLOTS) * (LINE + SLOT_BYTES)
        return slice(start, start + LINE)

    def start(self, what: str, deposit: Callable[[Tensor], object], collect: Collect) -> Operation:
        """Deposit now, collect later.

        Args:
            what: operation and length, the same on all ranks. deposit: fills this rank's slot (bytes). collect: reads
            the slots of all ranks, in order of index.
        """
        while len(self._started) >= SLOTS:
            self._started[0].wait()
        number = self._next
        self._next += 1
        for rank in range(self.size):
            if rank != self.index:
                self._await(self._collected[rank], number - SLOTS + 1, rank)
        operation = Operation(self, number, what, collect)
        self.memory.map[self._label(self.index, number)] = operation.label
        deposit(self.slot(self.index, number))
        self._post(self._deposited[self.index], number + 1)
        self._started.append(operation)
        return operation

    def finish(self, operation: Operation) -> None:
        """Collect for this operation, and for those before it."""
        while self._started:
            oldest = self._started[0]
            for rank in range(self.size):
                if rank != self.index:
                    self._await(self._deposited[rank], oldest.number + 1, rank)
                    self._compare(oldest, rank)
            oldest.collect([self.slot(rank, oldest.number) for rank in range(self.size)])
            oldest.done = True
            self._started.popleft()
            self._post(self._collected[self.index], oldest.number + 1)
            if oldest is operation:
                return

    def _compare(self, operation: Operation, rank: int) -> None:
        theirs = self.memory.map[self._label(rank, operation.number)]
        if theirs != operation.label:
            raise MismatchError(
                f"rank {self.index} of the axis is at {_text(operation.label)}, rank {rank} at {_text(theirs)}"
            )

    def has_arrived(self, operation: Operation) -> bool:
        """Whether finishing it would not have to wait."""
        return all(reached(word.value, operation.number + 1) for word in self._deposited)

    def _post(self, word: ctypes.c_uint32, value: int) -> None:
        word.value = counted(value)
        self.memory.wake(word)

    def _await(self, word: ctypes.c_uint32, value: int, rank: int) -> None:
        """Return when the counter has come to `value`."""
        if not reached(word.value, value):
            self.memory.wait(lambda: None if reached(seen := word.value, value) else seen, word, (rank,))


class Operation:
    """Something started. The engine's comm treats it as it does torch's work handles."""

    def __init__(self, channel: Channel, number: int, what: str, collect: Collect) -> None:
        self.channel, self.number, self.collect, self.done = channel, number, collect, False
        self.label = what.encode().ljust(LINE, b"\0")[:LINE]

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self.done or self.channel.has_arrived(self)

    def wait(self) -> None:
        """Return when the result is there. Raises PeerLostError if another rank is gone, or late,
        MismatchError if it is at something else.
        """
        if not self.done:
            self.channel.finish(self)


def _text(label: bytes) -> str:
    return label.rstrip(b"\0").decode(errors="replace")
