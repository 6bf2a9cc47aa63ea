"""Where the sends and receives of a compute order go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from parallel.pipeline.actions import Action, Schedule, no_search_for_cycles
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

    Raises:
        ScheduleError: the compute order reads what no rank computes, or its ranks wait for each other in a circle.
        ValueError: it has communication already.
    """
    if any(action.kind.is_message for program in compute_order.ranks for action in program):
        raise ValueError(f"schedule {compute_order.name!r} has sends or receives already: give the compute order alone")
    progress = Progress(compute_order, _NOMINAL_COSTS)
    progress.require_complete()
    programs: list[list[Action]] = [[] for _ in compute_order.ranks]
    for _, rank, _, action in sorted(_ends(compute_order, progress)):
        programs[rank].append(action)
        send = output_send(action, compute_order)
        if send is not None:
            programs[rank].append(send)
            programs[compute_order.peer(send)].append(send.counterpart)
    return replace(compute_order, ranks=tuple(map(tuple, programs)))


def _ends(schedule: Schedule, progress: Progress) -> Iterator[tuple[float, int, int, Action]]:
    """The end of each action, its rank and position. Actions that take no time end with the one before them."""
    for rank, program in enumerate(schedule.ranks):
        ends, last = iter(progress.ends[rank]), 0.0
        for position, action in enumerate(program):
            last = next(ends) if action.kind.is_compute else last
            yield last, rank, position, action
