"""Walks through a program by what is ready: the rule of `readiness.py` with real messages.

Receives are kept posted ahead on every lane, results are sent at once, and before each action the rank asks which of
its lanes have brought something. Where nothing is ready it sleeps until a message comes.

*Ranks that choose alike.* Where collectives come within actions, all ranks of a group must run the same actions in the
same order: along the tensor and context axes, and along data where gradients are reduced with each micro-batch or
weights gathered. The first rank of the group chooses, and tells the others a number per action by a lane on the host,
one action ahead of the one that it runs. That cannot lock up: of all that the first ranks have run, take the earliest
action that some follower has yet to do. Its message was sent, since the rank there that follows the sender has done an
earlier action; and the others are at the same collectives.

*Reductions that end a step* (ZeRO 0 and 1) are between data ranks that choose for themselves. All start them in one
order, that of the stages in the schedule, since collectives must match. And a rank that waits in one must not keep back
what another pipeline needs, so they are held until the rank is at the last action that sends something. On every rank
that holds a stage above 0 this is the last micro-batch's backward of the lowest of these stages; call it s. Whoever
waits there waits for the same rank of another pipeline to come that far. If it has not, the rank that it waits for in
turn, within its pipeline, is at a backward of a stage above s. So no circle closes, even if a rank does nothing else
while it waits for a reduction, as a GPU's stream does. NCCL's communicators of different axes are met in different
orders, but each by all its members in one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from parallel.comm import Axis
from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.boundary import Route
from parallel.pipeline.choices import Choices
from parallel.pipeline.graph import input_receive, output_send
from parallel.pipeline.lanes import Lane, Post
from parallel.pipeline.local_stage import Deferrer, Inbox, LocalStage, Tensors
from parallel.pipeline.readiness import Chooser, check_lanes

_POSTED_AHEAD = 2  # receives on each lane: one that may have arrived, one on its way
_EXPECTED = 2  # actions that are announced beside the one that is run


class Pace:
    """Keeps the host one action ahead of a GPU, no more: what it has launched it can no longer choose among.

    That has not run on a GPU yet.
    """

    def __init__(self) -> None:
        self._running: torch.cuda.Event | None = None

    def step(self) -> None:
        """An action has been launched: return when the one before it is done."""
        before, self._running = self._running, torch.cuda.Event(blocking=True)
        self._running.record()
        if before is not None:
            before.synchronize()


class _Task(NamedTuple):
    """What there is to know of an action.

    Attributes:
        inbox: that a lane fills for it, if one does. receives: to be posted when it is done. send: the message that its
            result is, the lane, and where its tensors are laid out.
    """

    action: Action
    micro_batch: int
    run: Callable[[int], None]
    inbox: Inbox | None
    receives: tuple[tuple[Lane, int], ...]
    send: tuple[Action, Lane, dict[int, Tensors]] | None


class Ready:
    """The first action that is ready.

    Args:
        schedule: validated; messages in it are not looked at. axis: the pipeline axis. device: where stages compute.
        stages: this rank's, ascending. post: its lanes. choices: among which ranks. announce: is told what will be run.
        deferrer: reduces gradients.
    """

    def __init__(
        self,
        schedule: Schedule,
        axis: Axis,
        device: torch.device,
        stages: Mapping[int, LocalStage],
        post: Post,
        choices: Choices,
        announce: Callable[[Sequence[Action]], None] | None,
        deferrer: Deferrer | None,
    ) -> None:
        check_lanes(schedule)
        self._chooser = Chooser(schedule, axis.index)
        self._where, self._post, self._choices = axis.meter.where, post, choices
        self._announce, self._deferrer = announce, deferrer
        self._tasks = [_task(action, schedule, stages[action.stage], post) for action in self._chooser.actions]
        fed = {(t.action.kind, t.action.stage): t.inbox for t in self._tasks if t.inbox is not None}
        self._lane_of = {key: inbox.lane for key, inbox in fed.items() if inbox.lane is not None}
        inboxes = dict.fromkeys(fed.values())  # one may feed whole backwards and split ones of a stage
        self._first = [(i.lane, m) for i in inboxes if i.lane is not None for m in i.order[:_POSTED_AHEAD]]
        self._num_sends = sum(task.send is not None for task in self._tasks)
        self._pace = Pace() if device.type == "cuda" else None
        self._overtakes = self._chooser.recompute_of
        self._reductions = _order_of_last(self._chooser.actions, list(stages))

    def run(self) -> None:
        """One pass."""
        self._chooser.restart()
        self._choices.begin()
        self._decided = deque[int]()
        self._not_run = dict.fromkeys(range(len(self._tasks)))
        sends_left = self._num_sends
        self._post.start(receives=self._first)
        if self._deferrer is not None:
            self._deferrer.hold(self._reductions)
        while self._not_run:
            position = self._next()
            task = self._tasks[position]
            del self._not_run[position]
            self._not_run.pop(self._overtakes.get(position, -1), None)
            sends_left -= task.send is not None
            if sends_left == 0 and self._deferrer is not None:
                self._deferrer.release()
            self._do(task)
        self._choices.finish()

    def _do(self, task: _Task) -> None:
        if self._announce is not None:
            expected = islice(self._not_run, _EXPECTED)
            self._announce([task.action, *(self._tasks[n].action for n in expected)])
        self._where.now(task.action)
        task.run(task.micro_batch)
        if task.send is not None:
            message, lane, laid_out = task.send
            self._where.now(message)
            self._post.start([(lane, task.micro_batch, laid_out.pop(task.micro_batch))], task.receives)
        elif task.receives:
            self._post.start(receives=task.receives)
        if self._pace is not None:
            self._pace.step()

    def _next(self) -> int:
        """The position of the action to run now, chosen here or by the first rank of the group."""
        if self._choices.follows:
            self._where.now("waiting for the choice of the first rank of the group")
            return self._choices.hear()
        while not self._decided and not self._decide(now=True):
            self._where.now("waiting for an action to be ready")
            self._post.wait_any([self._lane_of[a.kind, a.stage] for a in self._chooser.awaited()])
        position = self._decided.popleft()
        if self._choices.ahead:
            self._decide(now=False)
        return position

    def _decide(self, *, now: bool) -> bool:
        """Choose one more action and tell the others, if one is ready.

        Args:
            now: whether the rank has nothing to do until then, as it must to recompute.
        """
        position = self._chooser.choose(self._has_arrived, recomputes=now)
        if position is None:
            return False
        self._chooser.take(position)
        inbox = self._tasks[position].inbox
        if self._choices.ahead and inbox is not None:
            inbox.fetch()  # the lane is asked about the message after it next
        self._choices.tell(position)
        self._decided.append(position)
        return True

    def _has_arrived(self, action: Action) -> bool:
        return self._lane_of[action.kind, action.stage].has_arrived()


def _task(action: Action, schedule: Schedule, stage: LocalStage, post: Post) -> _Task:
    m, forward = action.micro_batch, action.kind is ActionKind.FORWARD
    assert m is not None
    inbox, coming = None, []
    if input_receive(action, schedule) is not None:
        inbox = stage.inputs if forward else stage.gradients
        assert inbox is not None and inbox.lane is not None
        place = inbox.order.index(m) + _POSTED_AHEAD
        coming = [(inbox.lane, later) for later in inbox.order[place : place + 1]]
    send, message = None, output_send(action, schedule)
    if message is not None:
        send = message, post.lanes[Route.of(message)], stage.outputs if forward else stage.input_gradients
    return _Task(action, m, stage.method(action.kind), inbox, tuple(coming), send)


def _order_of_last(actions: Sequence[Action], stages: Sequence[int]) -> list[int]:
    """The places of stages on this rank, in the order in which their gradients are complete in the program."""
    sums = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)
    last = {action.stage: n for n, action in enumerate(actions) if action.kind in sums}
    return [stages.index(stage) for stage in sorted(last, key=last.__getitem__)]
