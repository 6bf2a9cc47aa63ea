"""Where each rank is, and how the others learn of it when a run hangs.

A rank writes down what it is at with plain attribute writes (`Whereabouts`), which a thread of its own reads. The
threads of all ranks meet at the key-value store (`Signs`), each by a connection of its own: what the main threads wait
for does not matter there.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")
Item = TypeVar("Item")


class Described(Protocol):
    """What can be told in words (an action of a schedule)."""

    @property
    def words(self) -> str:
        """E.g. `forward of micro-batch 2 on stage 1`."""


class Listener(Protocol):
    """Who is told the moments at which a rank turns to something else (parallel.pipeline.recording)."""

    def now(self, doing: str | Described | None) -> None:
        """Another thing is being done, until the next call."""

    def arrived(self) -> None:
        """What is being done has taken what it needs from another rank."""

    def enter(self, doing: str | Described | None) -> None:
        """Something within that begins."""

    def leave(self) -> None:
        """What was entered last ends."""

    def stamp(self) -> Any:
        """This moment, to be given to `watched`."""

    def watched(self, kind: str, axis: Any, began: Any, size: int | None) -> None:
        """A call of this kind along an axis ends. size: bytes handed over; None: what was started was waited for."""


class Whereabouts:
    """What this rank is doing. One per grid: it hangs on the meter of its axes.

    Attributes:
        step: that is being taken, 1 the first. phase: of the run. doing: within it.
        waiting: (operation, axis) of the collective or message that this rank is in, None outside.
        moves: counts changes of all these. On CUDA these are launches: the GPU itself may be behind.
        listener: is told of each change while somebody wants the times of them.
    """

    __slots__ = ("doing", "listener", "moves", "phase", "step", "waiting")

    def __init__(self) -> None:
        self.step, self.phase, self.moves = 0, "starting", 0
        self.doing: str | Described | None = None
        self.waiting: tuple[str, Any] | None = None
        self.listener: Listener | None = None

    def begin(self, step: int) -> None:
        """A step of the training begins."""
        self.step, self.phase = step, "training"
        self.now(None)

    def now(self, doing: str | Described | None) -> None:
        """Another thing is being done."""
        self.doing = doing
        self.moves += 1
        if self.listener is not None:
            self.listener.now(doing)

    def arrived(self) -> None:
        """What is being done has taken what it needs from another rank, whether it waited for that or not."""
        if self.listener is not None:
            self.listener.arrived()

    @contextlib.contextmanager
    def during(self, doing: str | Described | None = None, *, phase: str | None = None) -> Iterator[None]:
        """A phase, or something within this one, after which what was before goes on."""
        before, listener = (self.phase, self.doing), self.listener
        self.phase, self.doing = phase or self.phase, doing
        self.moves += 1
        if listener is not None:
            listener.enter(doing)
        try:
            yield
        finally:
            self.phase, self.doing = before
            self.moves += 1
            if listener is not None:
                listener.leave()

    def each(self, items: Iterable[Item], doing: str) -> Iterator[Item]:
        """The items, getting each of which is what is done."""
        self.now(doing)
        for item in items:
            yield item
            self.now(doing)

    @property
    def place(self) -> str:
        """Step, phase and what is done, e.g. `step 4, training, forward of micro-batch 2 on stage 1`."""
        doing = self.doing
        words = doing if doing is None or isinstance(doing, str) else doing.words
        return ", ".join(part for part in (f"step {self.step}" if self.step else None, self.phase, words) if part)

    @property
    def wait(self) -> str | None:
        """The collective that this rank is in, e.g. `all_reduce along the data axis (0, 2)`."""
        if (waiting := self.waiting) is None:
            return None
        kind, axis = waiting
        ranks = ", ".join(map(str, axis.ranks[:8])) + (", ..." if len(axis.ranks) > 8 else "")
        return f"{kind} along the {axis.name} axis ({ranks})"


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        host: its name. machine: tells it from others of that name. place, wait: see Whereabouts.
        still: seconds since it last moved. written: by its host's clock.
        stacks: the file with the stacks of its threads, None while it has written none.
    """

    host: str
    machine: str
    pid: int
    place: str
    wait: str | None
    still: float
    written: float
    stacks: str | None = None


class Attempt(threading.Thread, Generic[Answer]):
    """A call that may never return, in a thread that is left behind then.

    Attributes:
        answers: what it has returned, none if it has not (yet), or failed.
    """

    def __init__(self, function: Callable[[], Answer], seconds: float) -> None:
        super().__init__(daemon=True)
        self._function, self.answers = function, list[Answer]()
        self.start()
        self.join(seconds)

    def run(self) -> None:
        """Called by the thread."""
        with contextlib.suppress(Exception):
            self.answers.append(self._function())


class Signs:
    """The signs of all ranks, in the store. Every call returns in `patience` seconds, whatever has become of the store.

    Args:
        witness: another connection to the store (non-blocking), over which nothing goes: it is closed when the store's
            process ends, and a store that is gone is not asked, about which torch would write a page.

    Attributes:
        answers: whether the store did, when it was last asked.
    """

    def __init__(self, store: dist.Store, witness: socket.socket, rank: int, size: int, patience: float) -> None:
        self._store, self._witness, self._rank, self._size, self._patience = store, witness, rank, size, patience
        self._last: Attempt[Any] | None = None
        self.answers = True

    def beat(self, sign: Sign) -> bool:
        """Say where this rank is; returns whether the run is known to hang."""
        return bool(self._ask(lambda: self._beat(sign)))

    def accuse(self) -> bool:
        """Say that the run hangs; returns whether this rank is the first to."""
        return self._ask(lambda: self._store.add("hung", 1) == 1) or False

    def answer(self, sign: Sign) -> None:
        """Say for the last time where this rank is, and where its stacks are."""
        self._ask(lambda: self._answer(sign))

    def answered(self) -> int:
        """How many ranks have."""
        return self._ask(lambda: self._store.add("answered", 0)) or 0

    def collect(self) -> tuple[dict[int, Sign], dict[int, Sign]]:
        """(last words of the ranks that have answered, last signs of those that have not)."""
        return self._ask(lambda: (self._read("answer", range(self._size)), self._lost())) or ({}, {})

    def close(self) -> None:
        """Everything is told."""
        self._ask(lambda: self._store.set("told", ""))

    def is_closed(self) -> bool:
        """Whether everything is told."""
        return bool(self._ask(lambda: self._store.check(["told"])))

    def _beat(self, sign: Sign) -> bool:
        self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))
        return bool(self._store.check(["hung"]))

    def _answer(self, sign: Sign) -> None:
        self._store.set(f"answer/{self._rank}", json.dumps(asdict(sign)))
        self._store.add("answered", 1)

    def _lost(self) -> dict[int, Sign]:
        return self._read("sign", [r for r in range(self._size) if not self._store.check([f"answer/{r}"])])

    def _read(self, kind: str, ranks: Sequence[int]) -> dict[int, Sign]:
        found = [rank for rank in ranks if self._store.check([f"{kind}/{rank}"])]
        return {rank: Sign(**json.loads(self._store.get(f"{kind}/{rank}"))) for rank in found}

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """One question at a time: while the store has not answered one it is not asked another."""
        if (self._last is not None and self._last.is_alive()) or not self._is_there():
            self.answers = False
            return None
        self._last = attempt = Attempt(question, self._patience)
        self.answers = bool(attempt.answers)
        return attempt.answers[0] if self.answers else None

    def _is_there(self) -> bool:
        """Whether the store's process has not ended (its host may have)."""
        try:
            return self._witness.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False
