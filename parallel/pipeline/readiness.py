"""Which action a rank runs next when it runs what is ready: the one rule that is simulated and executed.

A schedule is a hint then (the idea: "Runtime-Readiness-First Pipeline", arXiv 2605.18750; this rule is our own): of the
actions that are ready the one that stands first in the rank's program runs. What stays as the schedule has it:

* The order of micro-batches within each stage and kind. So gradients are summed in the same order, bit for bit, and
  each lane (a boundary, in one direction) carries its messages in an order that both of its ends know.
* The most activations that are alive at once on the rank, its `cap`.

What does not change places: a rank that starts what is ready cannot turn back when what the others wait for comes a
moment later. So nothing but a weight gradient, which is short, runs ahead of a forward: without new forwards the ranks
behind run dry. On a rank with one stage no forward runs ahead of a backward either, and no weight gradient ahead of an
input gradient: such forwards take the room early, and such weight gradients are missing at the end, where they are what
fills the time. This is by simulation (docs/log.md): without it `ready` is up to 10 % slower than the program in order
where messages take time and nothing jitters; with it, not by more than 2 %, and as fast or faster with jitter.

Why it cannot deadlock: an action that makes an activation runs ahead of others only if afterwards *the rest of the
program, run in its own order, still fits under the cap* (the banker's rule: the schedule itself is the way out that is
kept open). What frees or needs none may run at any time as far as the cap goes, and the first action that is not done
is ahead of nothing. So at any moment every rank could go on in the order of its program. All programs together are an
order of all actions that respects what they read; of those not yet done take the first. Its inputs are there: what it
reads is done, each lane has brought the messages before its own, and ranks send at once. It fits. So some rank has
something to run until nothing is left. A bound on the count alone would not do for several stages per rank: forwards of
the first could take the room that the forwards of the later ones need before anything can be freed.

Recomputes (R) wait for nobody and nobody waits for them. One runs where the rank has nothing else to do but weight
gradients that come after it in the program; they run in the program's order, and no more lie ahead of their backwards
than the program has at once. A backward that is ready before its R has run overtakes it: it computes again what it
needs, and the R is not run any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import Literal

from parallel.pipeline.actions import (
    Action,
    ActionKind,
    Schedule,
    ScheduleError,
    live_activations,
    recomputed_ahead,
)
from parallel.pipeline.graph import data_dependencies, input_receive

Policy = Literal["static", "ready"]
"""How ranks go through a schedule: in its order, or by what is ready."""
POLICIES: tuple[Policy, ...] = ("static", "ready")

_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = range(3)
_QUEUES = {  # a whole backward is in turn with both: with gradients of inputs (messages) and of weights (sums)
    ActionKind.FORWARD: (_FORWARD,),
    ActionKind.BACKWARD: (_INPUT_GRADIENT, _WEIGHT_GRADIENT),
    ActionKind.BACKWARD_INPUT: (_INPUT_GRADIENT,),
    ActionKind.BACKWARD_WEIGHT: (_WEIGHT_GRADIENT,),
}

_GRADIENTS = frozenset({ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT})
_FORWARDS = frozenset({ActionKind.FORWARD})
_NOT_AHEAD: dict[ActionKind, frozenset[ActionKind]] = {
    ActionKind.FORWARD: _FORWARDS,  # of another stage
    **dict.fromkeys(_GRADIENTS, _FORWARDS),
    ActionKind.BACKWARD_WEIGHT: frozenset(),
}
_NOT_AHEAD_OF_ONE_STAGE = _NOT_AHEAD | dict.fromkeys((ActionKind.FORWARD, ActionKind.BACKWARD_WEIGHT), _GRADIENTS)
"""What actions of a kind do not run ahead of. See "What does not change places"."""


class Chooser:
    """Where one rank is in a pass over a schedule, and what it may run next.

    Actions go by their position in `actions`, a small number that a leader can tell those who follow it: they run what
    it has chosen and choose nothing. A choice looks at the heads of three queues per stage of the rank.

    Args:
        schedule: validated; `check_lanes` has passed. rank: on the pipeline axis.

    Attributes:
        actions: the compute actions of the rank's program; the order is the priority.
        cap: activations that may be alive at once, each of one stage.
        live: those that are.
        recompute_of: the position of the R of a backward, by that of the backward.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.actions: Sequence[Action] = tuple(a for a in schedule.ranks[rank] if a.kind.is_compute)
        places = {action: position for position, action in enumerate(self.actions)}
        alive = [0, *live_activations(schedule, rank, self.actions)]
        self.cap = max(alive)
        self._delta = [after - before for before, after in pairwise(alive)]
        reads = [data_dependencies(action, schedule, places) for action in self.actions]
        needs = [[read for read in of_one if read.kind is not ActionKind.RECOMPUTE] for of_one in reads]
        self._needs = [[places[read] for read in of_one if read in places] for of_one in needs]  # on this rank
        self._recomputes = [n for n, a in enumerate(self.actions) if a.kind is ActionKind.RECOMPUTE]
        self.recompute_of = _recompute_of(self.actions) if self._recomputes else {}
        self._most_ahead = max(recomputed_ahead(self.actions), default=0)
        self._behind = _NOT_AHEAD if len(schedule.stages_of(rank)) > 1 else _NOT_AHEAD_OF_ONE_STAGE
        self._lacks = [input_receive(action, schedule) is not None for action in self.actions]
        queues: dict[tuple[int, int], list[int]] = defaultdict(list)
        for position, action in enumerate(self.actions):
            for queue in _QUEUES.get(action.kind, ()):
                queues[action.stage, queue].append(position)
        self._in_order = list(queues.values())
        self.restart()

    def restart(self) -> None:
        """Begin a new pass: nothing is done."""
        self.live = 0
        self._done = bytearray(len(self.actions))
        self._first = 0  # the first that is not done
        self._next_recompute, self._ahead = 0, set[int]()  # among recomputes; of these, those whose backward is to come
        self._queues = [queue[::-1] for queue in self._in_order]  # the last entry is the head
        self._turns = [len(_QUEUES.get(a.kind, ())) for a in self.actions]  # queues whose head it has yet to become
        for queue in self._queues:
            self._turns[queue[-1]] -= 1

    @property
    def is_finished(self) -> bool:
        """Whether every action has been taken, or overtaken."""
        return self._first == len(self.actions)

    def choose(self, has_arrived: Callable[[Action], bool], *, recomputes: bool = True) -> int | None:
        """The position of the action to run now, None where none is ready. Changes nothing.

        Args:
            has_arrived: whether the message that brings this action's input is here. Asked of the head of a lane alone,
                which is the oldest message not yet taken, and only where all else that the action needs is done.
            recomputes: whether an R counts, which is always ready.
        """
        actions = self.actions
        first = next((p for p in self._candidates() if not self._lacks[p] or has_arrived(actions[p])), None)
        again = self._recompute() if recomputes and self._recomputes else None
        if again is None or first is None:
            return again if first is None else first
        return min(first, again) if actions[first].kind is ActionKind.BACKWARD_WEIGHT else first

    def is_done(self, position: int) -> bool:
        """Whether an action was taken or overtaken."""
        return bool(self._done[position])

    def awaited(self) -> list[Action]:
        """After a choice of None: the actions that lack nothing but their message."""
        return [self.actions[position] for position in self._candidates()]

    def take(self, position: int) -> Action:
        """Count an action as done (before the next choice it is), and return it. A backward overtakes its R."""
        action = self.actions[position]
        assert not self._done[position] and self._turns[position] == 0, f"{action} is not next of its stage and kind"
        self._done[position] = True
        self.live += self._delta[position]
        if action.kind is ActionKind.RECOMPUTE:
            self._ahead.add(position)
        elif (again := self.recompute_of.get(position)) is not None:
            self._done[again] = True
            self._ahead.discard(again)
        for queue in self._queues:
            if queue and queue[-1] == position:
                queue.pop()
                if queue:
                    self._turns[queue[-1]] -= 1
        while self._first < len(self.actions) and self._done[self._first]:
            self._first += 1
        return action

    def _recompute(self) -> int | None:
        """The position of the next R, if there is room for it and its forward is done."""
        while self._next_recompute < len(self._recomputes) and self._done[self._recomputes[self._next_recompute]]:
            self._next_recompute += 1
        if self._next_recompute == len(self._recomputes) or len(self._ahead) == self._most_ahead:
            return None
        position = self._recomputes[self._next_recompute]
        return position if all(self._done[need] for need in self._needs[position]) else None

    def _candidates(self) -> Iterator[int]:
        """The positions of actions that lack nothing but, perhaps, their message, by priority."""
        passed: set[ActionKind] = set()
        for head in sorted({queue[-1] for queue in self._queues if queue}):
            kind = self.actions[head].kind
            if (
                self._turns[head] == 0
                and self._behind[kind].isdisjoint(passed)
                and all(self._done[need] for need in self._needs[head])
                and (self._delta[head] <= 0 or self._leaves_a_way_out(head))
            ):
                yield head
            passed.add(kind)

    def _leaves_a_way_out(self, position: int) -> bool:
        """Whether the actions that are passed over still fit under the cap if this one has run."""
        if position == self._first:
            return True
        alive = self.live + 1
        for passed in range(self._first, position):
            if alive > self.cap:
                return False
            if not self._done[passed]:
                alive += self._delta[passed]
        return alive <= self.cap


def _recompute_of(actions: Sequence[Action]) -> dict[int, int]:
    """The position of each recompute by that of its backward."""
    recomputes = {(a.stage, a.micro_batch): n for n, a in enumerate(actions) if a.kind is ActionKind.RECOMPUTE}
    backwards = (n for n, a in enumerate(actions) if a.kind in _GRADIENTS)
    found = ((n, recomputes.get((actions[n].stage, actions[n].micro_batch))) for n in backwards)
    return {n: again for n, again in found if again is not None}


def check_lanes(schedule: Schedule) -> None:
    """Refuse a schedule with neighbouring stages that run their micro-batches in different orders.

    Raises:
        ScheduleError: two neighbouring stages on different ranks; names them and where they part.
    """
    forward: dict[int, list[int]] = defaultdict(list)
    backward: dict[int, list[int]] = defaultdict(list)
    for program in schedule.ranks:
        for action in program:
            if action.kind.is_compute and action.micro_batch is not None:
                queues = _QUEUES.get(action.kind, ())
                if _FORWARD in queues:
                    forward[action.stage].append(action.micro_batch)
                elif _INPUT_GRADIENT in queues:
                    backward[action.stage].append(action.micro_batch)
    for what, orders in (("forward", forward), ("backward", backward)):
        for stage in range(schedule.num_stages - 1):
            if schedule.crosses_ranks(stage, stage + 1) and orders[stage] != orders[stage + 1]:
                pairs = zip_longest(orders[stage], orders[stage + 1])
                here, there = next((a, b) for a, b in pairs if a != b)
                raise ScheduleError(
                    f"schedule {schedule.name!r} cannot run by readiness: stages {stage} and {stage + 1} take their "
                    f"micro-batches {what} in different orders ({here} at the one where the other has {there}), but a "
                    "lane delivers in the order in which it was sent: give both one order, or choose the static policy"
                )
