"""Generators of pipeline schedules: pure functions from sizes to the compute order of each rank.

A generator writes no communication; `insert_communication` adds it, and `build_schedule` does both and validates. All
schedules run the backwards of a stage in ascending order of micro-batches, so gradients are summed in the same order
whichever schedule is chosen. What p, m and v are in comments: ranks, micro-batches, stages per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from parallel.pipeline.actions import Action, ActionKind, Schedule, no_search_for_cycles
from parallel.pipeline.communication import insert_communication
from parallel.pipeline.schedule_file import is_schedule_file, read_schedule
from parallel.pipeline.validation import validate
from parallel.pipeline.zero_bubble import v_half, zb_h1, zb_h2, zb_v


def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe"). Compute order, one stage per rank.

    Bubble (p-1)(F+B), peak activations m on every rank.
    """
    micro_batches = range(num_micro_batches)
    return _one_stage_per_rank(
        "gpipe",
        num_micro_batches,
        [_forwards(rank, micro_batches) + _backwards(rank, micro_batches) for rank in range(num_ranks)],
    )


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """One forward, one backward in turn after a warm-up of forwards. Compute order, one stage per rank.

    From Narayanan et al. 2019, "PipeDream", in the synchronous form of Megatron-LM (2021). Bubble (p-1)(F+B) as
    GPipe's, but peak activations min(m, p-r) on rank r.
    """
    programs = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - rank - 1, num_micro_batches)
        program = _forwards(rank, range(warm_up))
        for steady in range(num_micro_batches - warm_up):
            program += [Action(ActionKind.FORWARD, rank, warm_up + steady), Action(ActionKind.BACKWARD, rank, steady)]
        programs.append(program + _backwards(rank, range(num_micro_batches - warm_up, num_micro_batches)))
    return _one_stage_per_rank("1f1b", num_micro_batches, programs)


def interleaved(num_ranks: int, num_micro_batches: int, virtual_stages: int = 2) -> Schedule:
    """1F1B over several stages per rank, stage s on rank s mod p (Narayanan et al. 2021, "Megatron-LM"). Compute order.

    Micro-batches go in groups of p through one of a rank's stages and then through the next. Bubble (p-1)(F+B)/v, where
    F and B are times of a rank's stages together; v times the messages of 1F1B. Where m is no multiple of p, the last
    group is one of p, less what it lacks: that is never slower than the whole group, as nothing waits for what is left
    out.
    """
    p, v = num_ranks, virtual_stages
    groups = [range(start, start + p) for start in range(0, num_micro_batches, p)]
    programs = []
    for rank in range(p):
        forwards = [a for group in groups for s in range(v) for a in _forwards(s * p + rank, group)]
        backwards = [a for group in groups for s in reversed(range(v)) for a in _backwards(s * p + rank, group)]
        warm_up = min(2 * (p - rank - 1) + (v - 1) * p, len(forwards))
        steady = zip(forwards[warm_up:], backwards, strict=False)
        program = [*forwards[:warm_up], *(a for pair in steady for a in pair), *backwards[len(forwards) - warm_up :]]
        programs.append(tuple(a for a in program if a.micro_batch in range(num_micro_batches)))
    return Schedule(
        name="interleaved",
        num_stages=p * v,
        num_micro_batches=num_micro_batches,
        stage_to_rank=tuple(range(p)) * v,
        ranks=tuple(programs),
    )


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


def behind_forwards(schedule: Schedule, times: int = 1) -> Schedule:
    """For the simulator: a training schedule behind forward passes over as many micro-batches, which keep nothing.

    Their micro-batches have the numbers after the others'. What reads live activations off it would be wrong.
    """
    if not times:
        return schedule
    count, placement = schedule.num_micro_batches, schedule.stage_to_rank
    first = forward_only(schedule.num_ranks, times * count, stage_to_rank=placement)
    if any(action.kind.is_message for program in schedule.ranks for action in program):
        first = insert_communication(first)
    ranks = [
        (*(replace(a, micro_batch=count + m) for a in before if (m := a.micro_batch) is not None), *program)
        for before, program in zip(first.ranks, schedule.ranks, strict=True)
    ]
    return replace(schedule, num_micro_batches=(1 + times) * count, ranks=tuple(ranks))


@dataclass(frozen=True, kw_only=True)
class Generator:
    """How the schedules of one name are made."""

    order: Callable[[int, int, int], Schedule]
    """(num_ranks, num_micro_batches, virtual_stages) to the compute order."""
    virtual_stages: int
    """Stages per rank unless the user says otherwise."""
    is_fixed: bool = True
    """Whether the user cannot say otherwise."""


SCHEDULES: dict[str, Generator] = {
    "gpipe": Generator(order=lambda p, m, _: gpipe(p, m), virtual_stages=1),
    "1f1b": Generator(order=lambda p, m, _: one_f_one_b(p, m), virtual_stages=1),
    "interleaved": Generator(order=interleaved, virtual_stages=2, is_fixed=False),
    "zb_h1": Generator(order=lambda p, m, _: zb_h1(p, m), virtual_stages=1),
    "zb_h2": Generator(order=lambda p, m, _: zb_h2(p, m), virtual_stages=1),
    "zb_v": Generator(order=lambda p, m, _: zb_v(p, m), virtual_stages=2),
    "v_half": Generator(order=lambda p, m, _: v_half(p, m), virtual_stages=2),
}
"""Training schedules by the name users give them."""


def virtual_stages_of(name: str, virtual_stages: int | None = None) -> int:
    """Stages per rank of the schedule of that name; `virtual_stages` is the user's wish, None for the schedule's own.

    Raises:
        ValueError: there is no schedule of that name, or it cannot hold so many stages per rank.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"unknown pipeline schedule {name!r}: choose one of {', '.join(SCHEDULES)}, or a file that ends in .csv"
        )
    generator = SCHEDULES[name]
    if virtual_stages is None or virtual_stages == generator.virtual_stages:
        return generator.virtual_stages
    several = ", ".join(name for name, other in SCHEDULES.items() if not other.is_fixed)
    given = f"parallel.virtual_stages is {virtual_stages}, but {name} holds"
    if generator.is_fixed:
        held = "one stage per rank" if generator.virtual_stages == 1 else f"{generator.virtual_stages} stages per rank"
        raise ValueError(f"{given} {held}: leave virtual_stages out, or choose parallel.schedule {several}")
    if virtual_stages < 2:
        raise ValueError(f"{given} several stages per rank: give 2 or more, or choose parallel.schedule 1f1b")
    return virtual_stages


@no_search_for_cycles()
def compute_order(name: str, num_ranks: int, num_micro_batches: int, virtual_stages: int | None = None) -> Schedule:
    """The compute order of the training schedule of that name.

    Raises:
        ValueError: as `virtual_stages_of`, or a size is below 1.
    """
    v = virtual_stages_of(name, virtual_stages)
    _check_sizes(num_ranks, num_micro_batches)
    return SCHEDULES[name].order(num_ranks, num_micro_batches, v)


def build_schedule(name: str, num_ranks: int, num_micro_batches: int, virtual_stages: int | None = None) -> Schedule:
    """The training schedule of that name, with its communication, validated.

    Args:
        name: one of `SCHEDULES`, or the path of a `.csv` file (`parallel.pipeline.schedule_file`).
        virtual_stages: stages per rank; None for the schedule's own number (interleaved: 2).

    Raises:
        ValueError: there is no schedule of that name, it cannot hold so many stages per rank, or a size is below 1.
        ScheduleError: the file cannot be read, does not fit these sizes, or is wrong.
    """
    if is_schedule_file(name):
        return read_schedule(name, num_ranks, num_micro_batches, virtual_stages)
    schedule = insert_communication(compute_order(name, num_ranks, num_micro_batches, virtual_stages))
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
