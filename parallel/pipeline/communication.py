"""Where the sends and receives of a compute order go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from parallel.pipeline.actions import Action, ActionKind, Schedule, no_search_for_cycles
from parallel.pipeline.costs import Costs
from parallel.pipeline.graph import output_send
from parallel.pipeline.progress import Progress

# Only the order of events matters. Equal times for F, I and W are what papers on schedules assume; most ends would tie
# then, and the latency, too small to reorder anything else, tells which message is ready first.
_NOMINAL_COSTS = Costs(latency=2.0**-20)


@no_search_for_cycles()
def insert_communication(compute_order: Schedule) -> Schedule:
    """Add the sends and receives that a compute order needs; any number of stages per rank, whole or split backward.

    All compute actions of all ranks are put in one sequence, by the time at which they end on a nominal machine. Each
    is followed in this sequence by its message, and a rank's program is what concerns that rank. So a send stands
    right after its compute action, and its receive stands where the receiver was at that moment: before the action
    then under way. This has three effects:

    * No deadlock: one sequence, in which both ends of a message are one event, respects every program. It holds for
      asynchronous posting, for sends that block until received, one channel per pair of ranks or one for everything.
    * Messages between two ranks are posted in the order in which they become ready: none is stuck behind a later one.
    * A receive is posted about one action before its data comes: early enough to hide the transfer behind compute
      where the schedule leaves room, at the price of one receive buffer held for that action. Posting at the last
      moment would save the buffer but make the sender hold the tensor instead, and expose the transfer.

    Recomputes (R) stay right before the action that they stand before, so that all is posted that is known by then.

    Raises:
        ScheduleError: the compute order reads what no rank computes, or its ranks wait for each other in a circle.
        ValueError: it has communication already.
    """
    if any(action.kind.is_message for program in compute_order.ranks for action in program):
        raise ValueError(f"schedule {compute_order.name!r} has sends or receives already: give the compute order alone")
    bare, recomputes = _without_recomputes(compute_order)
    progress = Progress(bare, _NOMINAL_COSTS)
    progress.require_complete()
    programs: list[list[Action]] = [[] for _ in compute_order.ranks]
    for _, rank, _, action in sorted(_ends(bare, progress)):
        programs[rank] += [*recomputes.get(action, ()), action]
        send = output_send(action, compute_order)
        if send is not None:
            programs[rank].append(send)
            programs[compute_order.peer(send)].append(send.counterpart)
    return replace(compute_order, ranks=tuple(map(tuple, programs)))


def _without_recomputes(schedule: Schedule) -> tuple[Schedule, dict[Action, list[Action]]]:
    """What is left without them, and those that stand before an action of it."""
    before = dict[Action, list[Action]]()
    if not schedule.recomputes:
        return schedule, before
    programs = list[tuple[Action, ...]]()
    for program in schedule.ranks:
        waiting = list[Action]()
        for action in program:
            if action.kind is ActionKind.RECOMPUTE:
                waiting.append(action)
            elif waiting:
                before[action], waiting = waiting, []
        programs.append((*(a for a in program if a.kind is not ActionKind.RECOMPUTE), *waiting))
    return replace(schedule, ranks=tuple(programs)), before


def _ends(schedule: Schedule, progress: Progress) -> Iterator[tuple[float, int, int, Action]]:
    """The end of each action, its rank and position. Actions that take no time end with the one before them."""
    for rank, program in enumerate(schedule.ranks):
        ends, last = iter(progress.ends[rank]), 0.0
        for position, action in enumerate(program):
            last = next(ends) if action.kind.is_compute else last
            yield last, rank, position, action
