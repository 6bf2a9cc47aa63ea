"""What waits for what in a schedule: the one graph that is validated, timed, and used to place communication.

A node is the place of an action, or the arrival of a message. An action waits for the one before it on its rank and
for the data it reads. A message arrives once both its ends are posted and the message before it has arrived: sends are
rendezvous. "Before it" is between the same two ranks or, on either of its ranks, whomever that was with. A schedule can
run exactly when this graph has no cycle; the second has all edges of the first. What carries messages (group_lanes) is
less strict than the second, which is why messages that stand side by side may be posted as one there.
"""

from __future__ import annotations

import graphlib
from collections.abc import Container
from typing import NamedTuple

from parallel.pipeline.actions import Action, ActionKind, Place, Schedule, ScheduleError


class Arrival(NamedTuple):
    """The moment when the message of a receive has come in."""

    receive: Action


Node = Place | Arrival
Graph = dict[Node, list[Node]]
"""Each node with the nodes it waits for. Lists, not sets: their order must be the same in every process."""


def data_dependencies(action: Action, schedule: Schedule, among: Container[Action] | None = None) -> list[Action]:
    """The compute actions whose result an action reads, on whichever rank (none for receives: see `input_receive`).

    Args:
        among: the actions that there are, if not all of the schedule's are looked at.
    """
    micro_batch, present = action.micro_batch, schedule.places if among is None else among

    def compute(kind: ActionKind, stage: int) -> Action:
        return Action(kind, stage, micro_batch)

    def input_gradient(stage: int) -> Action:
        split = compute(ActionKind.BACKWARD_INPUT, stage)
        return split if split in present else compute(ActionKind.BACKWARD, stage)

    stage = action.stage
    match action.kind:
        case ActionKind.FORWARD:
            return [compute(ActionKind.FORWARD, stage - 1)] if stage > 0 else []
        case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT:
            reads, recompute = [compute(ActionKind.FORWARD, stage)], compute(ActionKind.RECOMPUTE, stage)
            reads += [recompute] if recompute in present else []
            return [*reads, input_gradient(stage + 1)] if stage + 1 < schedule.num_stages else reads
        case ActionKind.BACKWARD_WEIGHT:
            return [compute(ActionKind.BACKWARD_INPUT, stage)]
        case ActionKind.RECOMPUTE | ActionKind.SEND_FORWARD:
            return [compute(ActionKind.FORWARD, stage)]
        case ActionKind.SEND_BACKWARD:
            return [input_gradient(stage)]
        case _:
            return []


def input_receive(action: Action, schedule: Schedule) -> Action | None:
    """The receive that brings the input of a compute action, None where the input is local."""
    match action.kind:
        case ActionKind.FORWARD if schedule.crosses_ranks(action.stage, action.stage - 1):
            return Action(ActionKind.RECV_FORWARD, action.stage, action.micro_batch)
        case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT if schedule.crosses_ranks(action.stage, action.stage + 1):
            return Action(ActionKind.RECV_BACKWARD, action.stage, action.micro_batch)
        case _:
            return None


def output_send(action: Action, schedule: Schedule) -> Action | None:
    """The send of a compute action's result, None where it has none or where it stays on the rank."""
    match action.kind:
        case ActionKind.FORWARD if schedule.crosses_ranks(action.stage, action.stage + 1):
            return Action(ActionKind.SEND_FORWARD, action.stage, action.micro_batch)
        case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT if schedule.crosses_ranks(action.stage, action.stage - 1):
            return Action(ActionKind.SEND_BACKWARD, action.stage, action.micro_batch)
        case _:
            return None


def dependency_graph(schedule: Schedule, *, one_channel: bool = False) -> Graph:
    """Every node of a schedule with the nodes it waits for.

    Args:
        one_channel: whether all messages of a rank share a channel, or those with each other rank have their own.

    Where a remote input has no receive, as in a compute order, its message takes the way of an ideal link: it arrives
    when the remote action is done, and queues behind no other.

    Raises:
        ScheduleError: an action reads what no rank computes.
    """
    graph: Graph = {}
    for rank, program in enumerate(schedule.ranks):
        last_arrival: dict[int, Arrival] = {}  # per channel
        for position, action in enumerate(program):
            place = Place(rank, position)
            waits_for = graph.setdefault(place, [])
            if position > 0:
                waits_for.append(Place(rank, position - 1))
            for dependency in data_dependencies(action, schedule):
                if dependency not in schedule.places:
                    raise ScheduleError(f"{action} needs {dependency}, which no rank computes", place)
                source = schedule.places[dependency]
                receive = input_receive(action, schedule)
                if source.rank == rank or receive is None:
                    waits_for.append(source)
                    continue
                waits_for.append(Arrival(receive))
                if receive not in schedule.places:
                    graph[Arrival(receive)] = [source]
            if action.kind.is_message:
                arrival = Arrival(action.counterpart if action.kind.is_send else action)
                graph.setdefault(arrival, []).append(place)
                channel = -1 if one_channel else schedule.peer(action)
                if channel in last_arrival:
                    graph[arrival].append(last_arrival[channel])
                last_arrival[channel] = arrival
    return graph


def execution_order(schedule: Schedule, graph: Graph) -> list[Node]:
    """All nodes of all ranks in an order in which they can happen.

    Raises:
        ScheduleError: there is none; the message shows the circle of actions that wait for each other.
    """
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        nodes: list[Node] = error.args[1]
        steps = [_describe(schedule, node) for node in nodes]
        circle = " before ".join(steps if len(steps) <= 12 else [*steps[:10], f"{len(steps) - 11} more", steps[-1]])
        places = [node if isinstance(node, Place) else schedule.places.get(node.receive) for node in nodes]
        first = min((place for place in places if place is not None), key=lambda place: place.position, default=None)
        raise ScheduleError(f"schedule {schedule.name!r} can make no progress (deadlock): {circle}", first) from None


def _describe(schedule: Schedule, node: Node) -> str:
    if isinstance(node, Arrival):
        return f"arrival of {node.receive}"
    return f"{schedule.ranks[node.rank][node.position]} (rank {node.rank})"
