"""The simulator: when each action of a schedule runs, given what actions and messages cost.

Two policies, with the semantics of the engine:

* ``static``: every rank runs its program in order, messages are posted where the program has them (`progress.py`).
* ``ready``: every rank runs what is ready (`readiness.py`, which the executor runs too). Receives are posted ahead on
  every lane and sends go at once, so a message waits for those before it on its lane alone: one boundary, one
  direction.

Units of time are the caller's: seconds, or multiples of a forward.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from itertools import count

from parallel.pipeline.actions import Action, ActionKind, Schedule, no_search_for_cycles
from parallel.pipeline.costs import Costs
from parallel.pipeline.graph import output_send
from parallel.pipeline.progress import Progress
from parallel.pipeline.readiness import POLICIES, Chooser, Policy, check_lanes
from parallel.pipeline.timeline import Message, Timeline

_AT_ONCE = 1e-9  # of a step's length: events that are no further apart happen together, however sums were rounded


@no_search_for_cycles()
def simulate(schedule: Schedule, costs: Costs, policy: Policy = "static") -> Timeline:
    """Run a schedule on paper.

    A compute order without communication runs on ideal links: no message queues, or waits for its receive.

    Raises:
        ScheduleError: the schedule can make no progress, or has no lanes to run by readiness.
        ValueError: the costs are for another number of stages or ranks; there is no such policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r}: choose one of {', '.join(POLICIES)}")
    if policy == "ready":
        check_lanes(schedule)
        return _Ready(schedule, costs).run()
    progress = Progress(schedule, costs)
    progress.require_complete()

    def messages() -> tuple[Message, ...]:
        ended = sorted(progress.messages, key=lambda message: message[2])
        return tuple(_message(schedule, progress.receive_of(number), start, end) for number, start, end in ended)

    return Timeline(
        schedule=schedule,
        costs=costs,
        programs=tuple([a for a in program if a.kind.is_compute] for program in schedule.ranks),
        starts=progress.starts,
        ends=progress.ends,
        passed=messages,
    )


def _message(schedule: Schedule, receive: Action, start: float, end: float) -> Message:
    target = schedule.stage_to_rank[receive.stage]
    return Message(receive=receive, source=schedule.peer(receive), target=target, start=start, end=end)


class _Ready:
    """Ranks that run what is ready, from event to event."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        costs.check(schedule)
        self.schedule, self.costs = schedule, costs
        self.durations, self.transfers = costs.durations(schedule), costs.transfers(schedule)
        ranks = range(schedule.num_ranks)
        self.choosers = [Chooser(schedule, rank) for rank in ranks]
        self.ran: list[list[Action]] = [[] for _ in ranks]
        self.starts, self.ends = [array("d") for _ in ranks], [array("d") for _ in ranks]
        self.messages: list[Message] = []
        self.lanes: dict[tuple[bool, int], float] = defaultdict(float)  # (forward, stage that receives) -> free again
        self.arrived: set[tuple[bool, int, int | None]] = set()
        self.number = count()
        self.events: list[tuple[float, int, int, Action]] = []  # when, number, the rank it is for, what ends there

    def run(self) -> Timeline:
        """Until nothing happens any more."""
        busy = [False] * self.schedule.num_ranks
        self._choose(set(range(self.schedule.num_ranks)), 0.0, busy)
        while self.events:
            now = self.events[0][0] * (1 + _AT_ONCE)
            touched = set()
            while self.events and self.events[0][0] <= now:
                time, _, rank, action = heapq.heappop(self.events)
                touched.add(rank)
                if action.kind.is_message:
                    self.arrived.add((action.kind is ActionKind.RECV_FORWARD, action.stage, action.micro_batch))
                else:
                    busy[rank] = False
                    self._send(action, time)
            self._choose(touched, time, busy)
        assert all(chooser.is_finished for chooser in self.choosers)
        return Timeline(
            schedule=self.schedule,
            costs=self.costs,
            programs=tuple(self.ran),
            starts=self.starts,
            ends=self.ends,
            passed=lambda: tuple(sorted(self.messages, key=lambda message: message.end)),
        )

    def _choose(self, ranks: set[int], now: float, busy: list[bool]) -> None:
        for rank in sorted(ranks):
            position = None if busy[rank] else self.choosers[rank].choose(self._has_arrived)
            if position is None:
                continue
            end = now + self._duration(self.choosers[rank], position)
            action = self.choosers[rank].take(position)
            self.ran[rank].append(action)
            self.starts[rank].append(now)
            self.ends[rank].append(end)
            busy[rank] = True
            heapq.heappush(self.events, (end, next(self.number), rank, action))

    def _duration(self, chooser: Chooser, position: int) -> float:
        """Of an action that is about to be taken."""
        action, again = chooser.actions[position], chooser.recompute_of.get(position)
        assert action.micro_batch is not None
        index = action.stage * self.schedule.num_micro_batches + action.micro_batch
        late = again is not None and not chooser.is_done(again)
        return self.durations[action.kind][index] + (self.durations[ActionKind.RECOMPUTE][index] if late else 0.0)

    def _has_arrived(self, action: Action) -> bool:
        return (action.kind is ActionKind.FORWARD, action.stage, action.micro_batch) in self.arrived

    def _send(self, action: Action, now: float) -> None:
        """What an action that has just ended hands to a stage on another rank."""
        send = output_send(action, self.schedule)
        if send is None:
            return
        receive = send.counterpart
        lane = forward, stage = receive.kind is ActionKind.RECV_FORWARD, receive.stage
        start = max(now, self.lanes[lane])
        end = start + (self.transfers[0][stage - 1] if forward else self.transfers[1][stage])
        self.lanes[lane] = end
        self.messages.append(_message(self.schedule, receive, start, end))
        heapq.heappush(self.events, (end, next(self.number), self.schedule.stage_to_rank[stage], receive))
