"""Lanes: how the executor sends tensors to the stages of other ranks, whatever carries them.

A lane has one route (`boundary.Route`), so one direction, and is first in, first out. A rank's post holds its lanes.
Sending never waits for the receiver; receives may be posted ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis, Pending
from parallel.pipeline.boundary import Route, Specs, routes_between_ranks

Tensors = tuple[Tensor, ...]


class Lane(ABC):
    """One end of one: a rank either sends on it or receives.

    Attributes:
        route: what it carries. specs: the tensors of each message; where there are none, nothing is ever sent, and what
            is taken is there at once.
    """

    route: Route
    specs: Specs

    @abstractmethod
    def send(self, micro_batch: int, tensors: Tensors) -> None:
        """Send a message, without waiting for the receiver. Its tensors are to be left alone until it is gone."""

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
    """

    lanes: Mapping[Route, Lane]
    carrier: str
    nbytes: int = 0

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


def open_post(
    stage_to_rank: Sequence[int], boundaries: Sequence[Specs], *, axis: Axis, device: torch.device, ready: bool = False
) -> Post:
    """The lanes of this rank. Collective over the world: all ranks open the same ones, in the same order.

    Args:
        stage_to_rank: the rank of each stage along `axis`. boundaries: entry s describes the inputs of stage s.
        device: where tensors are. ready: whether `has_arrived` and `wait_any` will be called, and lanes used in
            whatever order; else messages are posted in the order of a validated schedule.
    """
    routes = routes_between_ranks(stage_to_rank, boundaries)
    return _GroupPost(routes, stage_to_rank, axis, device)


# Messages whose end is not waited for. A message is freed at the latest when this many others have been posted after
# it: gloo does not tell that a send is done before somebody waits for it. A valid schedule does not block on that.
_SENDS_IN_FLIGHT = 4


class _GroupLane(Lane):
    def __init__(self, post: _GroupPost, route: Route, specs: Specs, peer: int) -> None:
        self.post, self.route, self.specs, self.peer = post, route, specs, peer
        self.coming: deque[list[Pending]] = deque()

    def send(self, micro_batch: int, tensors: Tensors) -> None:
        post = self.post
        post.free(_SENDS_IN_FLIGHT - 1)
        post.sent.append([comm.send_start(x, post.axis, self.peer) for x in tensors])

    def expect(self, micro_batch: int) -> None:
        post = self.post
        buffers = [torch.empty(spec.shape, dtype=spec.dtype, device=post.device) for spec in self.specs]
        self.coming.append([comm.recv_start(x, post.axis, self.peer) for x in buffers])

    def has_arrived(self) -> bool:
        return all(pending.is_done() for pending in self.coming[0])

    def take(self) -> Tensors:
        return tuple(pending.wait() for pending in self.coming.popleft())


class _GroupPost(Post):
    def __init__(
        self, routes: Mapping[Route, Specs], stage_to_rank: Sequence[int], axis: Axis, device: torch.device
    ) -> None:
        self.axis, self.device, self.carrier = axis, device, "the pipeline axis's process group"
        self.sent: deque[list[Pending]] = deque()
        self.lanes = {}
        for route, specs in routes.items():
            ends = [stage_to_rank[stage] for stage in route]
            if axis.index in ends:
                self.lanes[route] = _GroupLane(self, route, specs, ends[ends[0] == axis.index])

    def free(self, keep: int) -> None:
        """Let go of messages that are done, and wait for the oldest until at most `keep` are left."""
        while self.sent and (len(self.sent) > keep or all(x.is_done() for x in self.sent[0])):
            for pending in self.sent.popleft():
                pending.wait()

    def wait_any(self, lanes: Sequence[Lane]) -> None:
        lane = lanes[0]
        assert isinstance(lane, _GroupLane)
        for pending in lane.coming[0]:
            pending.wait()

    def finish(self) -> None:
        self.free(0)
