"""Where the sends and receives of a compute order go."""

from __future__ import annotations

from dataclasses import replace

from parallel.pipeline.actions import Action, ActionKind, Place, Schedule
from parallel.pipeline.graph import dependency_graph
from parallel.pipeline.simulation import Costs, earliest_times

# Only the order of events matters. Equal times for F, I and W are what papers on schedules assume; most ends would tie
# then, and the latency, too small to reorder anything else, tells which message is ready first.
_NOMINAL_COSTS = Costs(latency=2.0**-20)


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
    times = earliest_times(compute_order, dependency_graph(compute_order), _NOMINAL_COSTS)
    programs: list[list[Action]] = [[] for _ in compute_order.ranks]
    places = [node for node in times if isinstance(node, Place)]

    def action_at(place: Place) -> Action:
        return compute_order.ranks[place.rank][place.position]

    for place in sorted(places, key=lambda place: (times[place][1], place)):
        action = action_at(place)
        programs[place.rank].append(action)
        send = _send_after(action, compute_order)
        if send is not None:
            programs[place.rank].append(send)
            programs[compute_order.peer(send)].append(send.counterpart)
    return replace(compute_order, ranks=tuple(map(tuple, programs)))


def _send_after(action: Action, schedule: Schedule) -> Action | None:
    """The send of an action's result, None where it has none or where it stays on the rank."""
    match action.kind:
        case ActionKind.FORWARD if schedule.crosses_ranks(action.stage, action.stage + 1):
            return Action(ActionKind.SEND_FORWARD, action.stage, action.micro_batch)
        case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT if schedule.crosses_ranks(action.stage, action.stage - 1):
            return Action(ActionKind.SEND_BACKWARD, action.stage, action.micro_batch)
        case _:
            return None
