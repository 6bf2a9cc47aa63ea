"""Generators of pipeline schedules: pure functions from sizes to the compute order of each rank.

A generator writes no communication; `insert_communication` adds it, and `build_schedule` does both and validates. All
schedules run the backwards of a stage in ascending order of micro-batches, so gradients are summed in the same order
whichever schedule is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.communication import insert_communication
from parallel.pipeline.validation import validate


def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe"). Compute order, one stage per rank.

    Bubble (p-1)(F+B), peak activations m on every rank. Raises ValueError for sizes below 1.
    """
    _check_sizes(num_ranks, num_micro_batches)
    micro_batches = range(num_micro_batches)
    return _one_stage_per_rank(
        "gpipe",
        num_micro_batches,
        [_forwards(rank, micro_batches) + _backwards(rank, micro_batches) for rank in range(num_ranks)],
    )


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """One forward, one backward in turn after a warm-up of forwards. Compute order, one stage per rank.

    From Narayanan et al. 2019, "PipeDream", in the synchronous form of Megatron-LM (2021). Bubble (p-1)(F+B) as
    GPipe's, but peak activations min(m, p-r) on rank r. Raises ValueError for sizes below 1.
    """
    _check_sizes(num_ranks, num_micro_batches)
    programs = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - rank - 1, num_micro_batches)
        program = _forwards(rank, range(warm_up))
        for steady in range(num_micro_batches - warm_up):
            program += [Action(ActionKind.FORWARD, rank, warm_up + steady), Action(ActionKind.BACKWARD, rank, steady)]
        programs.append(program + _backwards(rank, range(num_micro_batches - warm_up, num_micro_batches)))
    return _one_stage_per_rank("1f1b", num_micro_batches, programs)


def forward_only(num_ranks: int, num_micro_batches: int, *, stage_to_rank: Sequence[int] | None = None) -> Schedule:
    """The compute order of evaluation: forwards alone, nothing kept.

    ``stage_to_rank`` is that of the training schedule where it holds several stages per rank (default: stage s on
    rank s). Such a rank takes ``num_ranks`` micro-batches through one of its stages before it turns to the next, as
    interleaved schedules do, so that the first of them has come around the other ranks by then.

    Raises:
        ValueError: sizes below 1, or a placement that does not fit the ranks.
    """
    _check_sizes(num_ranks, num_micro_batches)
    placement = tuple(range(num_ranks) if stage_to_rank is None else stage_to_rank)
    programs: list[list[Action]] = [[] for _ in range(num_ranks)]
    for start in range(0, num_micro_batches, num_ranks):
        group = range(start, min(start + num_ranks, num_micro_batches))
        for stage, rank in enumerate(placement):
            programs[rank] += _forwards(stage, group)
    return Schedule(
        name="forward_only",
        num_stages=len(placement),
        num_micro_batches=num_micro_batches,
        stage_to_rank=placement,
        ranks=tuple(map(tuple, programs)),
    )


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""Training schedules by the name users give them: (num_ranks, num_micro_batches) to the compute order."""


def build_schedule(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The training schedule of that name, with its communication, validated.

    Raises:
        ValueError: there is no schedule of that name, or a size is below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown pipeline schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    schedule = insert_communication(SCHEDULES[name](num_ranks, num_micro_batches))
    validate(schedule)
    return schedule


def _check_sizes(num_ranks: int, num_micro_batches: int) -> None:
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(
            f"a pipeline of {num_ranks} ranks with {num_micro_batches} micro-batches: both must be at least 1"
        )


def _forwards(stage: int, micro_batches: range) -> list[Action]:
    return [Action(ActionKind.FORWARD, stage, micro_batch) for micro_batch in micro_batches]


def _backwards(stage: int, micro_batches: range) -> list[Action]:
    return [Action(ActionKind.BACKWARD, stage, micro_batch) for micro_batch in micro_batches]


def _one_stage_per_rank(name: str, num_micro_batches: int, programs: list[list[Action]]) -> Schedule:
    return Schedule(
        name=name,
        num_stages=len(programs),
        num_micro_batches=num_micro_batches,
        stage_to_rank=tuple(range(len(programs))),
        ranks=tuple(map(tuple, programs)),
    )
