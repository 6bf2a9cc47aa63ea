"""How the ranks of a group come to run the same: the first chooses, and tells the others by lanes over the host."""

from __future__ import annotations

from typing import Protocol

import torch

from parallel.comm import Axis
from parallel.pipeline.boundary import TensorSpec
from parallel.pipeline.lanes import open_post

_POSTED_AHEAD = 2  # receives of choices


class Choices(Protocol):
    """How what one rank chooses gets to the ranks that do the same.

    Attributes:
        follows: whether another rank chooses. ahead: whether to choose one action ahead.
    """

    follows: bool
    ahead: bool

    def begin(self) -> None:
        """Another pass."""

    def tell(self, position: int) -> None:
        """Tell the others the next action."""

    def hear(self) -> int:
        """The next action, of the rank that chooses."""

    def finish(self) -> None:
        """The pass is over."""


class Alone:
    """A rank that chooses for itself."""

    follows = ahead = False

    def begin(self) -> None:
        """Nothing is to be done."""

    def tell(self, position: int) -> None:
        """Nobody is told."""

    def hear(self) -> int:
        """Nobody tells."""
        raise AssertionError("a rank alone follows nobody")

    def finish(self) -> None:
        """Nothing is to be done."""


class Group:
    """The first rank of an axis tells the others, by lanes that go through the host.

    Args:
        axis: the ranks that choose alike; all come here together. count: actions of a pass.
        ahead: whether to tell an action before the one before it is run.
    """

    def __init__(self, axis: Axis, count: int, *, ahead: bool) -> None:
        # A star: "stages" of which every other one is on the first rank, and that rank's outputs are the choices.
        stage_to_rank = [rank for follower in range(1, axis.size) for rank in (0, follower)]
        number = (TensorSpec((), torch.int64, carries_gradient=False),)
        boundaries = [number if rank else () for rank in stage_to_rank]
        self._post = open_post(stage_to_rank, boundaries, axis=axis, device=torch.device("cpu"))
        self._post.bounded = False  # who tells does not wait, however far behind another is
        self._count, self.follows, self.ahead = count, axis.index > 0, ahead
        self._lanes = [lane for lane in self._post.lanes.values() if lane.specs]

    def begin(self) -> None:
        """Another pass."""
        self._next = 0
        if self.follows:
            self._posted = 0
            self._expect(_POSTED_AHEAD)

    def _expect(self, more: int) -> None:
        for _ in range(min(more, self._count - self._posted)):
            self._lanes[0].expect(self._posted)
            self._posted += 1

    def tell(self, position: int) -> None:
        """Tell the others the next action."""
        number = (torch.tensor(position),)
        self._post.start([(lane, self._next, number) for lane in self._lanes])
        self._next += 1

    def hear(self) -> int:
        """The next action, of the rank that chooses."""
        (position,) = self._lanes[0].take()
        self._expect(1)
        self._next += 1
        return int(position)

    def finish(self) -> None:
        """The pass is over. Of actions that were overtaken nobody was told; the messages come all the same."""
        while self._next < self._count:
            if self.follows:
                self.hear()
            else:
                self.tell(-1)
        self._post.end_pass()


def open_choices(group: Axis | None, count: int, device: torch.device) -> Choices:
    """Among the ranks of `group`, or for one alone. Collective over the world.

    A host is ahead of its GPU anyway; on CPUs, where the ranks of a group are done at the same moment, the next action
    is told while they compute.

    Args:
        count: compute actions of a pass. device: where stages compute.
    """
    return Alone() if group is None or group.size == 1 else Group(group, count, ahead=device.type == "cpu")
