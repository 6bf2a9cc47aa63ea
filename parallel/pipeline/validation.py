"""The validator: whether a schedule computes each thing once, in a possible order, and cannot deadlock.

The checks run from the simplest to the most far-reaching, each with its own message, so that a faulty schedule is
reported by its cause and not by the deadlock that follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
from numpy.typing import NDArray

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
from parallel.pipeline.progress import Progress

K = ActionKind
_KINDS = tuple(ActionKind)
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
_BACKWARDS = (K.BACKWARD, K.BACKWARD_INPUT, K.BACKWARD_WEIGHT)
# What an action reads, where there is such an action: its kind, and its stage relative to the reader's.
_BACKWARD_READS = ((K.FORWARD, 0), (K.RECOMPUTE, 0), (K.RECV_BACKWARD, 0), (K.BACKWARD, 1), (K.BACKWARD_INPUT, 1))
_READS = {
    K.FORWARD: ((K.RECV_FORWARD, 0), (K.FORWARD, -1)),
    K.BACKWARD: _BACKWARD_READS,
    K.BACKWARD_INPUT: _BACKWARD_READS,
    K.BACKWARD_WEIGHT: ((K.BACKWARD_INPUT, 0),),
    K.RECOMPUTE: ((K.FORWARD, 0),),
    K.SEND_FORWARD: ((K.FORWARD, 0),),
    K.SEND_BACKWARD: ((K.BACKWARD, 0), (K.BACKWARD_INPUT, 0)),
}
_Mask = NDArray[np.bool_]
_Numbers = NDArray[np.int64]


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
    actions = _Actions(schedule)
    _check_computes(actions)
    _check_messages(actions)
    _check_program_order(actions)
    _check_channel_order(actions)
    Progress(schedule, Costs(), one_channel=True).require_complete()
    _check_activations(schedule, activation_budget)


def validate_compute_order(schedule: Schedule) -> None:
    """The same of a schedule without its communication: what is left of the rules when no messages are asked for.

    Raises:
        ScheduleError: as `validate`.
    """
    actions = _Actions(schedule)
    _check_computes(actions)
    _check_program_order(actions)
    Progress(schedule, Costs()).require_complete()


class _Actions:
    """All actions of a schedule as columns of numbers, rank by rank, so that a rule is one look at all of them.

    Every action is on the rank of its stage, within the sizes of the schedule, and stands there once.

    Attributes:
        rank, kind, stage: of each action; kind is its number in `_KINDS`. index: stage * m + micro-batch.
        at: per kind and index, the number of that action, -1 where there is none.

    Raises:
        ScheduleError: the first action that breaks one of these rules.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        m, num_stages = schedule.num_micro_batches, schedule.num_stages
        lengths = [len(program) for program in schedule.ranks]
        self.starts = np.cumsum([0, *lengths])
        self.rank = np.repeat(np.arange(len(lengths)), lengths)
        rows = [(_CODES[a.kind], a.stage, a.micro_batch) for a in chain.from_iterable(schedule.ranks)]
        self.kind = np.array([kind for kind, _, _ in rows], np.int64)
        # Numbers of any size can be written; what is too large stays so.
        self.stage = np.array([min(stage, num_stages) for _, stage, _ in rows], np.int64)
        micro_batch = np.array([-1 if n is None else min(n, m) for _, _, n in rows], np.int64)
        self.refuse(self.stage >= num_stages, lambda a: f"{a} names stage {a.stage} of {num_stages}")
        self.refuse(micro_batch >= m, lambda a: f"{a} names micro-batch {a.micro_batch} of {m}")
        owner = np.array(schedule.stage_to_rank)
        self.refuse(
            owner[self.stage] != self.rank,
            lambda a: f"{a} does not belong here: rank {schedule.stage_to_rank[a.stage]} holds stage {a.stage}",
        )
        self.index = self.stage * m + micro_batch
        self.of_micro_batch = micro_batch >= 0
        numbers = np.flatnonzero(self.of_micro_batch)[::-1]  # backwards: of several, the first is written last
        self.at = np.full((len(_KINDS), num_stages * m), -1)
        self.at[self.kind[numbers], self.index[numbers]] = numbers
        first = np.arange(len(rows))
        first[numbers] = self.at[self.kind[numbers], self.index[numbers]]
        self.refuse(first != np.arange(len(rows)), lambda a: f"{a} stands more than once")
        # Whether there is a message between a stage and the one before it, and the one after it.
        self.crosses_before = np.array([schedule.crosses_ranks(stage, stage - 1) for stage in range(num_stages)])
        self.crosses_after = np.array([schedule.crosses_ranks(stage, stage + 1) for stage in range(num_stages)])

    def place(self, number: int) -> Place:
        rank = int(self.rank[number])
        return Place(rank, int(number - self.starts[rank]))

    def action(self, number: int) -> Action:
        rank, position = self.place(number)
        return self.schedule.ranks[rank][position]

    def of(self, *kinds: ActionKind) -> _Mask:
        """Which actions are of these kinds."""
        return np.isin(self.kind, [_CODES[kind] for kind in kinds])

    def has(self, kind: ActionKind) -> _Mask:
        """At which indices there is an action of that kind."""
        return self.at[_CODES[kind]] >= 0

    def same(self, kind: ActionKind, step: int = 0) -> _Numbers:
        """For each action: the number of that of this kind for its micro-batch, `step` stages on; -1: there is none."""
        index = self.index + step * self.schedule.num_micro_batches
        inside = self.of_micro_batch & (index >= 0) & (index < self.at.shape[1])
        return np.where(inside, self.at[_CODES[kind], np.where(inside, index, 0)], -1)

    def refuse(self, wrong: _Mask, why: Callable[[Action], str]) -> None:
        """Raise ScheduleError for the first of these actions."""
        if wrong.any():
            number = int(np.argmax(wrong))
            raise ScheduleError(why(self.action(number)), self.place(number))


def _check_computes(actions: _Actions) -> None:
    kinds, m = ActionKind, actions.schedule.num_micro_batches
    forward, recompute = actions.has(kinds.FORWARD), actions.has(kinds.RECOMPUTE)
    whole, of_input, of_weight = map(actions.has, _BACKWARDS)
    if actions.schedule.is_forward_only:
        right = forward & ~recompute
    else:
        right = forward & (whole ^ of_input) & (of_input == of_weight)
    if right.all():
        return
    index = int(np.argmin(right))
    numbers = {
        kind: int(actions.at[_CODES[kind], index]) for kind in kinds if kind.is_compute and actions.has(kind)[index]
    }
    what = f"stage {index // m}, micro-batch {index % m} {_wrong_kinds(set(numbers))}"
    if not numbers:
        raise ScheduleError(f"rank {actions.schedule.stage_to_rank[index // m]}: {what}")
    first = min(numbers.values())
    raise ScheduleError(f"{actions.action(first)}: {what}", actions.place(first))


def _wrong_kinds(found: set[ActionKind]) -> str:
    """What is wrong with the kinds of compute actions of one micro-batch on one stage."""
    backward = [kind.value for kind in _BACKWARDS if kind in found]
    if ActionKind.FORWARD not in found:
        return "has no forward"
    if backward:
        return f"has backward actions {', '.join(backward)}: give one B, or one I and one W"
    if ActionKind.RECOMPUTE in found:
        return "has a recompute (R) and no backward to need it"
    return "has no backward, though others have: its activations would never be freed"


def _check_messages(actions: _Actions) -> None:
    schedule = actions.schedule
    before, after = actions.crosses_before[actions.stage], actions.crosses_after[actions.stage]
    wrong = np.zeros_like(before)
    for kind, crosses, other, step in (
        (K.SEND_FORWARD, after, K.RECV_FORWARD, 1),
        (K.RECV_FORWARD, before, K.SEND_FORWARD, -1),
        (K.SEND_BACKWARD, before, K.RECV_BACKWARD, -1),
        (K.RECV_BACKWARD, after, K.SEND_BACKWARD, 1),
    ):
        wrong |= actions.of(kind) & (~crosses | (actions.same(other, step) < 0))
    actions.refuse(wrong, lambda a: _wrong_end(a, schedule))
    if schedule.is_forward_only:
        gradients = actions.of(K.SEND_BACKWARD, K.RECV_BACKWARD)
        actions.refuse(gradients, lambda a: f"{a} carries a gradient in a schedule without backward")
    forward = actions.of(K.FORWARD) & before & (actions.same(K.RECV_FORWARD) < 0)
    backward = actions.of(K.BACKWARD, K.BACKWARD_INPUT) & after & (actions.same(K.RECV_BACKWARD) < 0)
    actions.refuse(
        forward | backward,
        lambda a: (
            f"{a} has its input on another rank and no receive {a.stage}"
            f"{'RECV_F' if a.kind is K.FORWARD else 'RECV_B'}{a.micro_batch}"
        ),
    )


def _wrong_end(a: Action, schedule: Schedule) -> str:
    """What is wrong with the other end of a message."""
    if not schedule.crosses_ranks(a.stage, a.counterpart.stage):
        return f"{a} has no other rank at its other end"
    missing = "receive" if a.kind.is_send else "send"
    return f"{a} has no matching {missing} {a.counterpart} on rank {schedule.peer(a)}"


def _check_program_order(actions: _Actions) -> None:
    late = []  # reader and what it reads, by number
    for kind, reads in _READS.items():
        for source in reads:
            numbers = np.flatnonzero(actions.of(kind))
            read = actions.same(*source)[numbers]
            wrong = (read > numbers) & (actions.rank[read] == actions.rank[numbers])
            if wrong.any():
                first = int(np.argmax(wrong))
                late.append((int(numbers[first]), int(read[first])))
    if late:
        reader, read_number = min(late)
        why = f"{actions.action(reader)} stands before {actions.action(read_number)}, which it needs"
        raise ScheduleError(why, actions.place(reader))


def _check_channel_order(actions: _Actions) -> None:
    """Both ranks of a pair must post the messages between them, of either direction, in one order."""
    numbers = np.flatnonzero(actions.of(K.SEND_FORWARD, K.RECV_FORWARD, K.SEND_BACKWARD, K.RECV_BACKWARD))
    onward = actions.of(K.SEND_FORWARD, K.RECV_BACKWARD)[numbers]
    rank = actions.rank[numbers]
    peer = np.array(actions.schedule.stage_to_rank)[actions.stage[numbers] + np.where(onward, 1, -1)]
    sends = numbers.copy()  # each message is named by its send
    for receive, send, step in ((K.RECV_FORWARD, K.SEND_FORWARD, -1), (K.RECV_BACKWARD, K.SEND_BACKWARD, 1)):
        received = actions.of(receive)[numbers]
        sends[received] = actions.same(send, step)[numbers][received]
    # The messages of each pair of ranks, pair after pair, as one end posts them and as the other does.
    order = np.lexsort((numbers, np.maximum(rank, peer), np.minimum(rank, peer)))
    lower = rank[order] < peer[order]
    here, there = order[lower], order[~lower]
    wrong = sends[here] != sends[there]
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    mine, its = here[first], there[first]
    raise ScheduleError(
        f"ranks {rank[mine]} and {peer[mine]} post their messages in different orders: where rank {rank[mine]} has the "
        f"message of {actions.action(sends[mine])}, rank {peer[mine]} has that of {actions.action(sends[its])}",
        actions.place(numbers[mine]),
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
