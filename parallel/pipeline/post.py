"""What lanes are: how the executor sends tensors to the stages of other ranks, whatever carries them.

A lane has one route (`boundary.Route`), so one direction, and is first in, first out. A rank's post holds its lanes.
Receives may be posted ahead. Sending does not wait for the receiver, unless the post is bounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from torch import Tensor

from parallel.pipeline.boundary import Route, Specs

Tensors = tuple[Tensor, ...]

SENDS_IN_FLIGHT = 4  # messages of a lane that may be with the sender at a time, of a post that is bounded


class Lane(ABC):
    """One end of one: a rank either sends on it or receives.

    Attributes:
        route: what it carries. specs: the tensors of each message; where there are none, nothing is ever sent, and what
            is taken is there at once.
    """

    route: Route
    specs: Specs

    @property
    @abstractmethod
    def num_expected(self) -> int:
        """Receives that are posted, and whose messages were not taken."""

    @abstractmethod
    def send(self, micro_batch: int, tensors: Tensors) -> None:
        """Send a message. Its tensors are to be left alone until it is gone."""

    @abstractmethod
    def expect(self, micro_batch: int) -> None:
        """Post the receive of the next message, which is that of `micro_batch`. Several may be posted ahead."""

    @abstractmethod
    def has_arrived(self) -> bool:
        """Whether the oldest expected message is there: `take` would return at once."""

    @abstractmethod
    def take(self) -> Tensors:
        """The oldest expected message, which this waits for.

        Raises:
            parallel.failures.PeerLostError: its sender is gone, or late.
            parallel.failures.MismatchError: what came is another.
        """


class Post(ABC):
    """All lanes of a rank.

    Attributes:
        lanes: those that it sends on and those that it receives on, by route.
        carrier: for people, what carries the messages.
        nbytes: that it holds for messages under way, beside what senders keep.
        bounded: a rank that is `SENDS_IN_FLIGHT` messages of a lane ahead of who receives them waits for him, or their
            tensors would pile up. For programs that are executed in a validated order, which do not lock up by that; at
            first as the post was opened (not for `ready`), to be set as the next pass needs it.
    """

    lanes: Mapping[Route, Lane]
    carrier: str
    nbytes: int = 0
    bounded: bool

    def start(self, sends: Iterable[tuple[Lane, int, Tensors]] = (), receives: Iterable[tuple[Lane, int]] = ()) -> None:
        """Post several messages at once, such as all that stand between two compute actions. Those of one lane keep
        their order; beside that there is none.

        Args:
            sends: (lane, micro-batch, tensors). receives: (lane, micro-batch).
        """
        for lane, micro_batch in receives:
            lane.expect(micro_batch)
        for lane, micro_batch, tensors in sends:
            lane.send(micro_batch, tensors)

    @abstractmethod
    def wait_any(self, lanes: Sequence[Lane]) -> None:
        """Return when a message has arrived on at least one of these lanes, on each of which one is expected."""

    @abstractmethod
    def finish(self) -> None:
        """Return when all that was sent is gone."""

    def end_pass(self) -> None:
        """`finish`; of what was expected nothing may be left, which the next pass would get."""
        self.finish()
        left = {str(route): lane.num_expected for route, lane in self.lanes.items() if lane.num_expected}
        assert not left, f"messages are still expected: {left}"

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds; all messages have been taken, or never will be."""


class FreeLane(Lane):
    """One whose messages have no tensors."""

    num_expected = 0

    def __init__(self, route: Route) -> None:
        self.route, self.specs = route, ()

    def send(self, micro_batch: int, tensors: Tensors) -> None:
        """Nothing is sent."""
        assert not tensors

    def expect(self, micro_batch: int) -> None:
        """Nothing is received."""

    def has_arrived(self) -> bool:
        """It always has."""
        return True

    def take(self) -> Tensors:
        """Nothing."""
        return ()


def message_bytes(specs: Specs) -> int:
    """Of the tensors of one message."""
    return sum(prod(spec.shape) * spec.dtype.itemsize for spec in specs)
