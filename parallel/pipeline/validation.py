"""The validator: whether a schedule computes each thing once, in a possible order, and cannot deadlock.

The checks run from the simplest to the most far-reaching, each with its own message, so that a faulty schedule is
reported by its cause and not by the deadlock that follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from parallel.pipeline.actions import Action, ActionKind, Schedule, ScheduleError, live_activations, peak_activations
from parallel.pipeline.graph import data_dependencies, dependency_graph, execution_order, input_receive


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
        ScheduleError: the first rule that is broken, with the rank and action.
    """
    _check_places(schedule)
    _check_computes(schedule)
    _check_messages(schedule)
    _check_program_order(schedule)
    _check_channel_order(schedule)
    execution_order(schedule, dependency_graph(schedule, one_channel=True))
    _check_activations(schedule, activation_budget)


def _actions(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    return ((rank, action) for rank, program in enumerate(schedule.ranks) for action in program)


def _check_places(schedule: Schedule) -> None:
    seen: set[Action] = set()
    for rank, action in _actions(schedule):
        if not 0 <= action.stage < schedule.num_stages:
            raise ScheduleError(f"rank {rank}: {action} names stage {action.stage} of {schedule.num_stages}")
        if action.micro_batch is not None and not 0 <= action.micro_batch < schedule.num_micro_batches:
            raise ScheduleError(
                f"rank {rank}: {action} names micro-batch {action.micro_batch} of {schedule.num_micro_batches}"
            )
        owner = schedule.stage_to_rank[action.stage]
        if owner != rank:
            raise ScheduleError(f"rank {rank}: {action} does not belong here: rank {owner} holds stage {action.stage}")
        if action in seen and not action.kind.is_whole_stage:
            raise ScheduleError(f"rank {rank}: {action} stands more than once")
        seen.add(action)


def _check_computes(schedule: Schedule) -> None:
    kinds = ActionKind
    for stage, rank in enumerate(schedule.stage_to_rank):
        for micro_batch in range(schedule.num_micro_batches):
            what = f"rank {rank}: stage {stage}, micro-batch {micro_batch}"
            present = {k for k in kinds if k.is_compute and Action(k, stage, micro_batch) in schedule.places}
            backward = present - {kinds.FORWARD, kinds.RECOMPUTE}
            if kinds.FORWARD not in present:
                raise ScheduleError(f"{what} has no forward")
            if schedule.is_forward_only:
                if kinds.RECOMPUTE in present:
                    raise ScheduleError(f"{what} has a recompute (R) and no backward to need it")
            elif not backward:
                raise ScheduleError(f"{what} has no backward, though others have: its activations would never be freed")
            elif backward not in ({kinds.BACKWARD}, {kinds.BACKWARD_INPUT, kinds.BACKWARD_WEIGHT}):
                found = ", ".join(sorted(kind.value for kind in backward))
                raise ScheduleError(f"{what} has backward actions {found}: give one B, or one I and one W")


def _check_messages(schedule: Schedule) -> None:
    for rank, action in _actions(schedule):
        if action.kind.is_message:
            other = action.counterpart
            if not schedule.crosses_ranks(action.stage, other.stage):
                raise ScheduleError(f"rank {rank}: {action} has no other rank at its other end")
            if other not in schedule.places:
                missing = "receive" if action.kind.is_send else "send"
                peer = schedule.peer(action)
                raise ScheduleError(f"rank {rank}: {action} has no matching {missing} {other} on rank {peer}")
            if schedule.is_forward_only and action.kind in (ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD):
                raise ScheduleError(f"rank {rank}: {action} carries a gradient in a schedule without backward")
        receive = input_receive(action, schedule)
        if receive is not None and receive not in schedule.places:
            raise ScheduleError(f"rank {rank}: {action} has its input on another rank and no receive {receive}")


def _check_program_order(schedule: Schedule) -> None:
    for action, place in schedule.places.items():
        needed = data_dependencies(action, schedule)
        receive = input_receive(action, schedule)
        if receive is not None:
            needed.append(receive)
        for dependency in needed:
            source = schedule.places[dependency]
            if source.rank == place.rank and source.position > place.position:
                raise ScheduleError(f"rank {place.rank}: {action} stands before {dependency}, which it needs")


def _check_channel_order(schedule: Schedule) -> None:
    """Both ranks of a pair must post the messages between them, of either direction, in one order."""
    posted: dict[tuple[int, int], list[Action]] = {}  # (rank, peer) -> messages, each named by its send
    for rank, action in _actions(schedule):
        if action.kind.is_message:
            send = action if action.kind.is_send else action.counterpart
            posted.setdefault((rank, schedule.peer(action)), []).append(send)
    for (rank, peer), messages in posted.items():
        for here, there in zip_longest(messages, posted[peer, rank]):
            if here != there:
                raise ScheduleError(
                    f"ranks {rank} and {peer} post their messages in different orders: where rank {rank} has the "
                    f"message of {here}, rank {peer} has that of {there}"
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
