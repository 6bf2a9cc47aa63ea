"""How ranks get on that run their programs in order: when each action ends and each message comes in, if ever.

Each rank goes on until it needs what is not there yet, and is woken by it: one visit to each action, on flat lists of
times. `graph.py` says the same as a graph, slowly, and names the circle where ranks wait for each other. The rules:

* An action starts when the one before it on its rank is done and its input is there.
* A message starts when both of its ends have posted it and those before it in the channels of both ends have arrived:
  sends are rendezvous. A rank has one channel with each other rank (gloo), or one for all its messages (`one_channel`,
  as on NCCL where a group's communicator exists and messages are not batched).
* In a schedule without messages, a compute order, inputs take the way of ideal links and queue behind no other.
"""

from __future__ import annotations

from array import array
from collections import deque

from parallel.pipeline.actions import Action, ActionKind, Place, Schedule, ScheduleError
from parallel.pipeline.costs import Costs
from parallel.pipeline.graph import dependency_graph, execution_order

_NONE = -(1 << 60)  # the place of an event that is not needed
_Plan = tuple[int, float, int, int, list[float]]
"""How actions of a kind and stage run: the place of the event of their input and the time from there to here, of the
event that they need of their own stage, of their own; their durations. Places are relative to an action's index."""


class Progress:
    """One pass over a schedule, as far as it gets.

    Attributes:
        starts, ends: of the compute actions of each rank, in the order of its program.
        messages: of each that came in the number (`receive_of`), start and end.
    """

    def __init__(self, schedule: Schedule, costs: Costs, *, one_channel: bool = False) -> None:
        costs.check(schedule)
        self.schedule, self._one_channel = schedule, one_channel
        self._m, self._size = schedule.num_micro_batches, schedule.num_stages * schedule.num_micro_batches
        self.starts = [array("d") for _ in schedule.ranks]
        self.ends = [array("d") for _ in schedule.ranks]
        self.messages: list[tuple[int, float, float]] = []
        # Events: when each forward and input gradient was done, and each message of one and the other came in.
        self._when: list[float | None] = [None] * (4 * self._size)
        self._waiting: dict[int, int] = {}  # event -> the rank that it wakes
        self._positions, self._clocks = [0] * schedule.num_ranks, [0.0] * schedule.num_ranks
        self._channels: dict[tuple[int, int], _Channel] = {}
        self._transfers = costs.transfers(schedule)
        self._plans = self._make_plans(costs)
        self._woken = list(range(schedule.num_ranks))
        while self._woken:
            self._run(self._woken.pop())

    @property
    def is_complete(self) -> bool:
        """Whether every rank has come to the end of its program."""
        return all(self._positions[rank] == len(program) for rank, program in enumerate(self.schedule.ranks))

    def require_complete(self) -> None:
        """Raise ScheduleError if a rank is stuck: it names the actions that wait for each other, or what is missing."""
        if self.is_complete:
            return
        execution_order(self.schedule, dependency_graph(self.schedule, one_channel=self._one_channel))
        rank = next(r for r, program in enumerate(self.schedule.ranks) if self._positions[r] < len(program))
        place = Place(rank, self._positions[rank])
        action = self.schedule.ranks[rank][place.position]
        raise ScheduleError(f"{action} waits for a message that the schedule does not have", place)

    def receive_of(self, number: int) -> Action:
        """The receive of the message of that number."""
        forward, index = number < self._size, number % self._size
        kind = ActionKind.RECV_FORWARD if forward else ActionKind.RECV_BACKWARD
        return Action(kind, index // self._m, index % self._m)

    def _make_plans(self, costs: Costs) -> dict[ActionKind, list[_Plan]]:
        schedule, m, size, kinds = self.schedule, self._m, self._size, ActionKind
        present = {action.kind for program in schedule.ranks for action in program}
        with_messages = any(kind.is_message for kind in present)
        durations = costs.durations(schedule)
        plans: dict[ActionKind, list[_Plan]] = {kind: [] for kind in durations}
        for stage in range(schedule.num_stages):
            forward: tuple[int, float] = (-m, 0.0) if stage else (_NONE, 0.0)
            backward: tuple[int, float] = (size + m, 0.0) if stage + 1 < schedule.num_stages else (_NONE, 0.0)
            if schedule.crosses_ranks(stage, stage - 1):
                forward = (2 * size, 0.0) if with_messages else (-m, self._transfers[0][stage - 1])
            if schedule.crosses_ranks(stage, stage + 1):
                backward = (3 * size, 0.0) if with_messages else (size + m, self._transfers[1][stage])
            plans[kinds.FORWARD].append((*forward, _NONE, 0, durations[kinds.FORWARD]))
            plans[kinds.BACKWARD].append((*backward, 0, size, durations[kinds.BACKWARD]))
            plans[kinds.BACKWARD_INPUT].append((*backward, 0, size, durations[kinds.BACKWARD_INPUT]))
            plans[kinds.BACKWARD_WEIGHT].append((_NONE, 0.0, size, _NONE, durations[kinds.BACKWARD_WEIGHT]))
            plans[kinds.RECOMPUTE].append((_NONE, 0.0, 0, _NONE, durations[kinds.RECOMPUTE]))
        return plans

    def _run(self, rank: int) -> None:
        """Go on with a rank's program until it ends or waits for an event."""
        program, plans, when, waiting, m = self.schedule.ranks[rank], self._plans, self._when, self._waiting, self._m
        start_next, end_next = self.starts[rank].append, self.ends[rank].append
        clock, begin = self._clocks[rank], self._positions[rank]
        for position in range(begin, len(program)):
            action = program[position]
            of_kind = plans.get(action.kind)
            if of_kind is None:
                event = self._post(rank, action, clock)
                if event != _NONE:
                    break
                continue
            source, transfer, own, noted, durations = of_kind[action.stage]
            index = action.stage * m + action.micro_batch  # type: ignore[operator]
            if source != _NONE:
                arrived = when[event := source + index]
                if arrived is None:
                    break
                if arrived + transfer > clock:
                    clock = self._wait(rank, position, clock, arrived + transfer)
            if own != _NONE and when[event := own + index] is None:
                break
            start_next(clock)
            clock += durations[index]
            end_next(clock)
            if noted != _NONE:
                when[event := noted + index] = clock
                if event in waiting:
                    self._woken.append(waiting.pop(event))
        else:
            self._clocks[rank], self._positions[rank] = clock, len(program)
            return
        waiting[event] = rank
        self._clocks[rank], self._positions[rank] = clock, position

    def _wait(self, rank: int, position: int, clock: float, until: float) -> float:
        """The input of an action comes later than the rank could run it; returns when it does."""
        return until

    # -- messages -----------------------------------------------------------------------------------------------------

    def _post(self, rank: int, action: Action, clock: float) -> int:
        """Post a send or receive at a rank; the event that must come first, `_NONE` if it is done."""
        kinds, stage, size = ActionKind, action.stage, self._size
        if action.micro_batch is None:
            return _NONE  # of a whole stage: beside the computing, at no cost
        index = stage * self._m + action.micro_batch
        match action.kind:
            case kinds.SEND_FORWARD:
                number, needed, neighbour = index + self._m, index, stage + 1
            case kinds.RECV_FORWARD:
                number, needed, neighbour = index, _NONE, stage - 1
            case kinds.SEND_BACKWARD:
                number, needed, neighbour = size + index - self._m, size + index, stage - 1
            case _:
                number, needed, neighbour = size + index, _NONE, stage + 1
        if needed != _NONE and self._when[needed] is None:
            return needed
        channel, other = self._ends(rank, self.schedule.stage_to_rank[neighbour])
        channel.posted.append((number, clock))
        if len(channel.posted) == 1:
            self._pass(channel, other)
        return _NONE

    def _ends(self, rank: int, peer: int) -> tuple[_Channel, _Channel]:
        """The channels that a message between two ranks takes, at one and at the other."""
        here, there = ((rank, -1), (peer, -1)) if self._one_channel else ((rank, peer), (peer, rank))
        make = self._channels.setdefault
        return make(here, _Channel(rank)), make(there, _Channel(peer))

    def _pass(self, channel: _Channel, other: _Channel) -> None:
        """Let messages through that are first at both of their ends, beginning with one between these two."""
        looked_at = [(channel, other)]
        while looked_at:
            one, two = looked_at.pop()
            while one.posted and two.posted and one.posted[0][0] == two.posted[0][0]:
                (number, posted), (_, posted_too) = one.posted.popleft(), two.posted.popleft()
                start = max(posted, posted_too, one.busy_until, two.busy_until)
                forward, stage = number < self._size, number % self._size // self._m
                end = start + (self._transfers[0][stage - 1] if forward else self._transfers[1][stage])
                one.busy_until = two.busy_until = end
                self.messages.append((number, start, end))
                event = 2 * self._size + number
                self._when[event] = end
                if event in self._waiting:
                    self._woken.append(self._waiting.pop(event))
                if self._one_channel:
                    looked_at += [(end_, self._partner(end_)) for end_ in (one, two) if end_.posted]

    def _partner(self, channel: _Channel) -> _Channel:
        """The other end of the first message of a channel."""
        number = channel.posted[0][0]
        forward, stage = number < self._size, number % self._size // self._m
        placement = self.schedule.stage_to_rank
        ranks = {placement[stage], placement[stage - 1 if forward else stage + 1]}
        (peer,) = ranks - {channel.rank}
        return self._ends(channel.rank, peer)[1]


class _Channel:
    """What one end of a channel has posted and has not come in yet, in order: number of the message, and when."""

    __slots__ = ("busy_until", "posted", "rank")

    def __init__(self, rank: int) -> None:
        self.posted: deque[tuple[int, float]] = deque()
        self.busy_until, self.rank = 0.0, rank
