"""The validator: whether a schedule computes each thing once, in a possible order, and cannot deadlock.

The checks run from the simplest to the most far-reaching, each with its own message, so that a faulty schedule is
reported by its cause and not by the deadlock that follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from parallel.pipeline.actions import (
    Action,
    ActionKind,
    Place,
    Schedule,
    ScheduleError,
    live_activations,
    peak_activations,
)
from parallel.pipeline.costs import Costs
from parallel.pipeline.graph import data_dependencies, input_receive
from parallel.pipeline.progress import Progress


def validate(schedule: Schedule, *, activation_budget: float | None = None) -> None:
    """Check that a schedule, complete with its communication, can be executed.

    * Every action is on the rank of its stage, within the sizes of the schedule, and stands there once (the reserved
      whole-stage actions may repeat).
    * Every stage runs each micro-batch forward once and backward once, whole or as one I and one W; or, for all
      alike, not backward at all. A recompute stands before a backward only.
    * Each message crosses ranks and has both ends; each input from another rank has its receive.
    * On each rank, results stand before what reads them. With the rules above, the count of live activations is then
      never negative and ends at zero.
    * Any two ranks post the messages between them in the same order, and the graph of data, programs and rendezvous
      messages has no cycle, even if all messages of a rank go one after the other.
    * No rank's peak of live activations, in units of its share of one micro-batch, is above ``activation_budget``.

    Raises:
        ScheduleError: the first rule that is broken, and the first action that breaks it.
    """
    _check_places(schedule)
    _check_computes(schedule)
    _check_messages(schedule)
    _check_program_order(schedule)
    _check_channel_order(schedule)
    Progress(schedule, Costs(), one_channel=True).require_complete()
    _check_activations(schedule, activation_budget)


def validate_compute_order(schedule: Schedule) -> None:
    """The same of a schedule without its communication: what is left of the rules when no messages are asked for.

    Raises:
        ScheduleError: as `validate`.
    """
    _check_places(schedule)
    _check_computes(schedule)
    _check_program_order(schedule)
    Progress(schedule, Costs()).require_complete()


def _actions(schedule: Schedule) -> Iterator[tuple[Place, Action]]:
    return ((Place(rank, i), a) for rank, program in enumerate(schedule.ranks) for i, a in enumerate(program))


def _check_places(schedule: Schedule) -> None:
    seen: set[Action] = set()
    for place, action in _actions(schedule):
        if not 0 <= action.stage < schedule.num_stages:
            raise ScheduleError(f"{action} names stage {action.stage} of {schedule.num_stages}", place)
        if action.micro_batch is not None and not 0 <= action.micro_batch < schedule.num_micro_batches:
            raise ScheduleError(
                f"{action} names micro-batch {action.micro_batch} of {schedule.num_micro_batches}", place
            )
        owner = schedule.stage_to_rank[action.stage]
        if owner != place.rank:
            raise ScheduleError(f"{action} does not belong here: rank {owner} holds stage {action.stage}", place)
        if action in seen and not action.kind.is_whole_stage:
            raise ScheduleError(f"{action} stands more than once", place)
        seen.add(action)


def _check_computes(schedule: Schedule) -> None:
    present: dict[tuple[int, int | None], dict[ActionKind, Place]] = {}
    for place, action in _actions(schedule):
        if action.kind.is_compute:
            present.setdefault((action.stage, action.micro_batch), {})[action.kind] = place
    for stage, rank in enumerate(schedule.stage_to_rank):
        for micro_batch in range(schedule.num_micro_batches):
            found = present.get((stage, micro_batch), {})
            why = _wrong_kinds(found.keys(), schedule.is_forward_only)
            if why is None:
                continue
            what = f"stage {stage}, micro-batch {micro_batch} {why}"
            if not found:
                raise ScheduleError(f"rank {rank}: {what}")
            first = min(found.values())
            raise ScheduleError(f"{schedule.ranks[rank][first.position]}: {what}", first)


def _wrong_kinds(found: Set[ActionKind], is_forward_only: bool) -> str | None:
    """What is wrong with the kinds of compute actions of one micro-batch on one stage."""
    kinds = ActionKind
    backward = found - {kinds.FORWARD, kinds.RECOMPUTE}
    if kinds.FORWARD not in found:
        return "has no forward"
    if is_forward_only:
        return "has a recompute (R) and no backward to need it" if kinds.RECOMPUTE in found else None
    if not backward:
        return "has no backward, though others have: its activations would never be freed"
    if backward not in ({kinds.BACKWARD}, {kinds.BACKWARD_INPUT, kinds.BACKWARD_WEIGHT}):
        return f"has backward actions {', '.join(sorted(k.value for k in backward))}: give one B, or one I and one W"
    return None


def _check_messages(schedule: Schedule) -> None:
    for place, action in _actions(schedule):
        if action.kind.is_message:
            other = action.counterpart
            if not schedule.crosses_ranks(action.stage, other.stage):
                raise ScheduleError(f"{action} has no other rank at its other end", place)
            if other not in schedule.places:
                missing = "receive" if action.kind.is_send else "send"
                peer = schedule.peer(action)
                raise ScheduleError(f"{action} has no matching {missing} {other} on rank {peer}", place)
            if schedule.is_forward_only and action.kind in (ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD):
                raise ScheduleError(f"{action} carries a gradient in a schedule without backward", place)
        receive = input_receive(action, schedule)
        if receive is not None and receive not in schedule.places:
            raise ScheduleError(f"{action} has its input on another rank and no receive {receive}", place)


def _check_program_order(schedule: Schedule) -> None:
    for action, place in schedule.places.items():
        needed = data_dependencies(action, schedule)
        receive = input_receive(action, schedule)
        if receive is not None and receive in schedule.places:
            needed.append(receive)
        for dependency in needed:
            source = schedule.places[dependency]
            if source.rank == place.rank and source.position > place.position:
                raise ScheduleError(f"{action} stands before {dependency}, which it needs", place)


def _check_channel_order(schedule: Schedule) -> None:
    """Both ranks of a pair must post the messages between them, of either direction, in one order."""
    posted: dict[tuple[int, int], list[tuple[Place, Action]]] = {}  # (rank, peer) -> messages, each named by its send
    for place, action in _actions(schedule):
        if action.kind.is_message:
            send = action if action.kind.is_send else action.counterpart
            posted.setdefault((place.rank, schedule.peer(action)), []).append((place, send))
    for (rank, peer), messages in posted.items():
        # As many there, since each has its other end.
        for (place, here), (_, there) in zip(messages, posted[peer, rank], strict=True):
            if here != there:
                raise ScheduleError(
                    f"ranks {rank} and {peer} post their messages in different orders: where rank {rank} has the "
                    f"message of {here}, rank {peer} has that of {there}",
                    place,
                )


def _check_activations(schedule: Schedule, budget: float | None) -> None:
    for rank in range(schedule.num_ranks):
        live = live_activations(schedule, rank)
        assert not live or (min(live) >= 0 and live[-1] == 0), (rank, live)
    if budget is None:
        return
    for rank, peak in enumerate(peak_activations(schedule)):
        if peak > budget:
            raise ScheduleError(f"rank {rank}: {peak:g} activations alive at once, above the budget of {budget:g}")
