"""Generators, and the communication that is added to compute orders, the random and the hand-written too."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.pipeline import (
    SCHEDULES,
    Action,
    ActionKind,
    Schedule,
    ScheduleError,
    build_schedule,
    compute_order,
    forward_only,
    insert_communication,
    validate,
)
from parallel.pipeline.graph import data_dependencies
from tests.parallel.pipeline.orders import in_any_order


def run_with_blocking_sends(schedule: Schedule) -> None:
    """A machine with no asynchrony: a rank stands still at a send or receive until its peer stands at the other end."""
    positions = [0] * schedule.num_ranks
    known: list[set[Action]] = [set() for _ in schedule.ranks]  # computed here, or received: then named by the receive

    def head(rank: int) -> Action | None:
        program = schedule.ranks[rank]
        return program[positions[rank]] if positions[rank] < len(program) else None

    def is_known(rank: int, dependency: Action, reader: Action) -> bool:
        if schedule.stage_to_rank[dependency.stage] == rank:
            return dependency in known[rank]
        forward = dependency.kind is ActionKind.FORWARD
        kind = ActionKind.RECV_FORWARD if forward else ActionKind.RECV_BACKWARD
        return Action(kind, reader.stage, reader.micro_batch) in known[rank]

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.num_ranks):
            action = head(rank)
            if action is None:
                continue
            if action.kind.is_message:
                peer = schedule.peer(action)
                if not action.kind.is_send or head(peer) != action.counterpart:
                    continue
                known[peer].add(action.counterpart)
                positions[peer] += 1
            assert all(is_known(rank, d, action) for d in data_dependencies(action, schedule)), f"{action} too early"
            known[rank].add(action)
            positions[rank] += 1
            moved = True
    assert all(head(rank) is None for rank in range(schedule.num_ranks)), f"stuck at {positions} in\n{schedule}"


def without_messages(schedule: Schedule) -> list[list[Action]]:
    return [[action for action in program if not action.kind.is_message] for program in schedule.ranks]


@pytest.mark.parametrize(("name", "v"), [*((name, None) for name in SCHEDULES), ("interleaved", 3)])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
def test_built_schedules_run(name: str, v: int | None, p: int) -> None:
    for m in (1, 2, 3, 4, 7, 8, 15):
        check_built(name, p, m, v)


def check_built(name: str, p: int, m: int, v: int | None) -> None:
    schedule = build_schedule(name, p, m, v)
    validate(schedule)
    run_with_blocking_sends(schedule)
    assert without_messages(schedule) == [list(program) for program in compute_order(name, p, m, v).ranks]
    crossings = sum(schedule.crosses_ranks(stage, stage + 1) for stage in range(schedule.num_stages))
    assert sum(action.kind.is_message for program in schedule.ranks for action in program) == 4 * crossings * m
    for stage, rank in enumerate(schedule.stage_to_rank):
        for kinds in ("F", "BI", "BW"):
            ordered = [a.micro_batch for a in schedule.ranks[rank] if a.stage == stage and a.kind.value in kinds]
            assert ordered == list(range(m))


def test_gpipe_order() -> None:
    assert str(compute_order("gpipe", 2, 2)) == "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1F1 1B0 1B1"


def test_1f1b_order() -> None:
    expected = """
        rank 0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
        rank 1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
        rank 2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """
    assert compute_order("1f1b", 3, 4).ranks == Schedule.from_text(expected).ranks


def test_interleaved_order() -> None:
    expected = """
        rank 0: 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
        rank 1: 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """
    assert compute_order("interleaved", 2, 4).ranks == Schedule.from_text(expected, stage_to_rank=(0, 1, 0, 1)).ranks


@pytest.mark.parametrize(("p", "m", "v"), [(1, 3, 2), (2, 4, 2), (3, 6, 4), (4, 12, 2), (5, 5, 3)])
def test_interleaved_is_megatrons(p: int, m: int, v: int) -> None:
    """By the rule that Megatron-LM gives for the k-th forward and backward of a rank, and for how many come first."""
    for rank, program in enumerate(compute_order("interleaved", p, m, v).ranks):
        expected = []
        warm_up = min(2 * (p - rank - 1) + (v - 1) * p, m * v)
        for k in range(warm_up + m * v):
            for kind, number in (("F", k), ("B", k - warm_up)):
                if 0 <= number < m * v:
                    chunk, micro_batch = number % (p * v) // p, number // (p * v) * p + number % p
                    expected.append(f"{(chunk if kind == 'F' else v - 1 - chunk) * p + rank}{kind}{micro_batch}")
        assert list(map(str, program)) == expected


@pytest.mark.parametrize("placement", [None, (0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0), (0, 0, 1, 2)])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
def test_forward_only(placement: tuple[int, ...] | None, m: int) -> None:
    schedule = insert_communication(forward_only(3, m, stage_to_rank=placement))
    validate(schedule, activation_budget=0)
    run_with_blocking_sends(schedule)
    assert schedule.is_forward_only


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown pipeline schedule '1b1f': choose one of gpipe, 1f1b"):
        build_schedule("1b1f", 2, 4)


@pytest.mark.parametrize(("p", "m"), [(0, 4), (2, 0), (2, -1)])
def test_sizes_below_one(p: int, m: int) -> None:
    for name in SCHEDULES:
        with pytest.raises(ValueError, match=f"{p} ranks with {m} micro-batches: both must be at least 1"):
            build_schedule(name, p, m)
    with pytest.raises(ValueError, match="at least 1"):
        forward_only(p, m)


@pytest.mark.parametrize(
    ("name", "v", "message"),
    [
        (
            "1f1b",
            2,
            "parallel.virtual_stages is 2, but 1f1b holds one stage per rank: .* parallel.schedule interleaved",
        ),
        ("gpipe", 0, "parallel.virtual_stages is 0, but gpipe holds one stage per rank"),
        ("interleaved", 1, "parallel.virtual_stages is 1, but interleaved holds several .* parallel.schedule 1f1b"),
        ("interleaved", -1, "parallel.virtual_stages is -1, but interleaved holds several"),
    ],
)
def test_virtual_stages_that_a_schedule_cannot_hold(name: str, v: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(name, 2, 4, v)


HAND_WRITTEN = {
    "split backward": ("0F0 0F1 0I0 0W0 0I1 0W1\n1F0 1I0 1F1 1I1 1W0 1W1", (0, 1)),
    "interleaved": ("0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1", (0, 1, 0, 1)),
    "V-shaped": ("0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1\n1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1", (0, 1, 1, 0)),
    "mixed, recomputing": ("0UNSHARD 0F0 0R0 0B0 0REDUCE\n1UNSHARD 1F0 1I0 1W0 1REDUCE 1REDUCE", (0, 1)),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_compute_orders(name: str) -> None:
    text, placement = HAND_WRITTEN[name]
    order = Schedule.from_text(text, stage_to_rank=placement)
    schedule = insert_communication(order)
    assert without_messages(schedule) == [list(program) for program in order.ranks]
    validate(schedule)
    run_with_blocking_sends(schedule)


def test_neighbours_on_one_rank_need_no_message() -> None:
    text, placement = HAND_WRITTEN["V-shaped"]
    schedule = insert_communication(Schedule.from_text(text, stage_to_rank=placement))
    messages = {str(a) for program in schedule.ranks for a in program if a.kind.is_message}
    assert "1SEND_F0" not in messages and "2SEND_B0" not in messages
    assert {"0SEND_F0", "2SEND_F0", "3SEND_B0", "1SEND_B0"} < messages


def test_receive_is_posted_before_the_action_under_way() -> None:
    schedule = build_schedule("gpipe", 2, 3)
    assert str(schedule).splitlines()[1] == (
        "rank 1: 1RECV_F0 1RECV_F1 1F0 1RECV_F2 1F1 1F2 1B0 1SEND_B0 1B1 1SEND_B1 1B2 1SEND_B2"
    )


def random_compute_order(seed: int) -> Schedule:
    """Any placement, any mix of whole and split backwards and recomputes, in any order that dependencies allow."""
    draw = random.Random(seed)
    num_ranks, num_micro_batches = draw.randint(1, 4), draw.randint(1, 4)
    placement = [*range(num_ranks), *(draw.randrange(num_ranks) for _ in range(draw.randint(0, 4)))]
    draw.shuffle(placement)
    forward = draw.random() < 0.2
    actions = []
    for stage in range(len(placement)):
        for micro_batch in range(num_micro_batches):
            kinds = "F" if forward else draw.choice(["FB", "FIW", "FRB", "FRIW"])
            actions += [Action.parse(f"{stage}{kind}{micro_batch}") for kind in kinds]
    return in_any_order(draw, f"random {seed}", [[a] for a in actions], placement, num_micro_batches)


@pytest.mark.parametrize("seed", range(150))
def test_random_compute_orders(seed: int) -> None:
    order = random_compute_order(seed)
    schedule = insert_communication(order)
    assert without_messages(schedule) == [list(program) for program in order.ranks]
    validate(schedule)
    run_with_blocking_sends(schedule)


def test_compute_order_in_a_circle() -> None:
    order = Schedule.from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError, match=r"no progress .*0B0 \(rank 0\) before 0F1 \(rank 0\)"):
        insert_communication(order)


def test_compute_order_with_a_hole() -> None:
    with pytest.raises(ScheduleError, match="rank 0, action 2: 0B0 needs 1B0, which no rank computes"):
        insert_communication(Schedule.from_text("0F0 0B0\n1F0"))


def test_communication_is_added_once() -> None:
    with pytest.raises(ValueError, match="has sends or receives already"):
        insert_communication(build_schedule("gpipe", 2, 2))


def test_every_process_builds_the_same_schedule() -> None:
    """Ranks build schedules on their own; an order that hung on string hashing would differ and deadlock."""
    code = "from parallel.pipeline import build_schedule; print(build_schedule('1f1b', 4, 6))"
    root = Path(__file__).parents[3]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{build_schedule('1f1b', 4, 6)}\n"}
