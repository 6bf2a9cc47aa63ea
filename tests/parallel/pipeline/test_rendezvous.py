"""Every schedule runs where messages block, in its own order and by what is ready; what validation refuses locks up."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.failures import MismatchError
from parallel.pipeline import SCHEDULES, Schedule, ScheduleError, build_schedule, validate
from parallel.pipeline.boundary import Route, TensorSpec
from parallel.pipeline.execution import PipelineExecutor
from parallel.pipeline.graph import input_receive
from parallel.pipeline.readiness import Policy
from tests.parallel.pipeline.blocking import (
    BlockingPost,
    Channel,
    LockedUpError,
    Wires,
    one_for_all,
    per_boundary,
    per_lane,
    run_threads,
)

SPEC = (TensorSpec((2,)),)


def schedules(ranks: Sequence[int], micro_batches: Sequence[int]) -> Iterator[Schedule]:
    """Of every name and size; fewer micro-batches than ranks, and numbers that fit nothing, among them."""
    for name in SCHEDULES:
        for p in ranks:
            for m in micro_batches:
                for v in (2, 3) if name == "interleaved" else (None,):
                    yield build_schedule(name, p, m, v)


def walk(schedule: Schedule, post: BlockingPost) -> None:
    """The program as it stands, with a wait where an action reads what is received. Messages that stand side by side
    are posted at once if that makes a difference.
    """
    for are_messages, actions in groupby(schedule.ranks[post.rank], key=lambda action: action.kind.is_message):
        if not are_messages:
            for receive in (input_receive(action, schedule) for action in actions):
                if receive is not None:
                    post.lanes[Route.of(receive)].take()
            continue
        messages = [(action, post.lanes[Route.of(action)], action.micro_batch or 0) for action in actions]
        if post.wires.batches:
            sends = [(lane, m, ()) for action, lane, m in messages if action.kind.is_send]
            post.start(sends, [(lane, m) for action, lane, m in messages if not action.kind.is_send])
            continue
        for action, lane, m in messages:
            lane.send(m, ()) if action.kind.is_send else lane.expect(m)
    post.finish()


def walk_all(schedule: Schedule, channel: Channel, **how: bool) -> None:
    wires = Wires(schedule.stage_to_rank, channel, **how)
    boundaries = [(), *[SPEC] * (schedule.num_stages - 1)]
    run_threads(schedule, wires, lambda rank: walk(schedule, BlockingPost(wires, rank, boundaries)))


def test_all_schedules_run_if_all_messages_of_a_rank_block() -> None:
    for schedule in schedules((2, 3, 4, 6), (1, 2, 3, 5, 8)):
        walk_all(schedule, one_for_all, blocks_sender=True)


def disturbed(draw: random.Random) -> Schedule:
    """A schedule with messages moved by a few places."""
    schedule = build_schedule(draw.choice(list(SCHEDULES)), draw.choice((2, 3, 4)), draw.choice((2, 3, 4)))
    programs = [list(program) for program in schedule.ranks]
    for _ in range(draw.choice((1, 2, 3))):
        program = draw.choice(programs)
        place = draw.choice([n for n, action in enumerate(program) if action.kind.is_message])
        message = program.pop(place)
        program.insert(max(0, place + draw.choice((-3, -2, -1, 1, 2, 3))), message)
    return replace(schedule, ranks=tuple(map(tuple, programs)))


def test_whatever_is_valid_runs() -> None:
    """One by one, and with neighbours together; most of what is not valid does not."""
    draw, found = random.Random(0), Counter[tuple[bool, bool]]()
    for _ in range(200):
        schedule, is_valid, runs = disturbed(draw), True, True
        try:
            validate(schedule)
        except ScheduleError:
            is_valid = False
        for how in ({"blocks_sender": True}, {"batches": True}) if is_valid else ({},):
            try:
                walk_all(schedule, one_for_all, **how)
            except (LockedUpError, MismatchError, IndexError):  # the last: not even expected
                runs = False
        found[is_valid, runs] += 1
    assert found[True, False] == 0 and found[True, True] > 10 and found[False, False] > 50, found


CROSSED = {
    # two ranks send to each other before they receive
    "both send": (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    ),
    # rank 0 sends its third micro-batch before it takes the first back from rank 2: a circle over three ranks
    "around": (
        "0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2 3RECV_F0 3F0 3RECV_F1 3F1 3RECV_F2 3F2",
        "1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 1RECV_F2 1F2 1SEND_F2",
        "2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 2RECV_F2 2F2 2SEND_F2",
    ),
}


@pytest.mark.parametrize("name", CROSSED)
def test_what_is_refused_locks_up(name: str) -> None:
    places = (0, 1, 2, 0) if name == "around" else None
    schedule = Schedule.from_text("\n".join(CROSSED[name]), stage_to_rank=places)
    with pytest.raises(ScheduleError):
        validate(schedule)
    with pytest.raises(LockedUpError):
        walk_all(schedule, one_for_all)
    with pytest.raises(LockedUpError):
        walk_all(schedule, one_for_all, blocks_sender=True)
    if name == "around":
        walk_all(schedule, per_boundary)  # with a group for each boundary nothing is in the way


class NoWeights:
    """Puts nothing off."""

    @contextmanager
    def deferring(self) -> Iterator[list]:
        yield []

    def hold(self, order: Sequence[int]) -> None:
        """Nothing is reduced."""

    def release(self) -> None:
        """Nothing is reduced."""


def execute(schedule: Schedule, policy: Policy, wires: Wires, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """(what came out, gradients of what went in) of stages that double and do nothing else."""
    draw = random.Random(rank)

    def stage(inputs: tuple[Tensor, ...], micro_batch: Tensor) -> tuple[Tensor, ...]:
        if policy == "ready":
            time.sleep(draw.random() * 2e-4)
        return (2 * (inputs[0] if inputs else micro_batch),)

    boundaries = [(), *[SPEC] * (schedule.num_stages - 1)]
    axis = Axis(name="pipeline", ranks=tuple(range(schedule.num_ranks)), index=rank, planned=True)
    executor = PipelineExecutor(
        schedule, dict.fromkeys(schedule.stages_of(rank), stage), boundaries, axis=axis, device=torch.device("cpu"),
        deferrer=NoWeights(), policy=policy, post=BlockingPost(wires, rank, boundaries),
    )  # fmt: skip
    micro_batches = [torch.full((2,), 1.0 + m, requires_grad=True) for m in range(schedule.num_micro_batches)]
    results = executor.run(micro_batches, lambda outputs, micro_batch: outputs[0].sum())
    return results, [x.grad for x in micro_batches if x.grad is not None]


def execute_all(schedule: Schedule, policy: Policy, channel: Channel, **how: bool) -> None:
    wires = Wires(schedule.stage_to_rank, channel, **how)
    found = run_threads(schedule, wires, lambda rank: execute(schedule, policy, wires, rank))
    factor, m = 2.0**schedule.num_stages, schedule.num_micro_batches
    for rank, (results, grads) in enumerate(found):
        last, first = schedule.num_stages - 1 in schedule.stages_of(rank), 0 in schedule.stages_of(rank)
        assert sorted(map(float, results)) == ([2 * factor * (1 + n) for n in range(m)] if last else [])
        assert all((x == factor).all() for x in grads) and len(grads) == (m if first else 0)


def test_the_executor_runs_them_in_order() -> None:
    """As over NCCL: what stands between two compute actions goes at once, and is done together."""
    for schedule in schedules((2, 4), (2, 5)):
        execute_all(schedule, "static", one_for_all, batches=True)
        execute_all(schedule, "static", per_boundary, batches=True)
        execute_all(schedule, "static", per_lane, blocks_sender=True)


def test_the_executor_runs_what_is_ready() -> None:
    for schedule in schedules((2, 4), (2, 5)):
        execute_all(schedule, "ready", per_lane)


def test_what_is_ready_needs_a_channel_per_direction() -> None:
    """A receive that is posted ahead would hold up what is sent after it."""
    with pytest.raises(LockedUpError):
        execute_all(build_schedule("1f1b", 2, 4), "ready", per_boundary)
