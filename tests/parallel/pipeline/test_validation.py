"""One broken schedule for every rule of the validator, each with its own message."""

from dataclasses import replace

import pytest

from parallel.pipeline import Schedule, ScheduleError, build_schedule, validate
from parallel.pipeline.graph import dependency_graph, execution_order

GOOD = """
    0F0 0SEND_F0 0RECV_B0 0B0
    1RECV_F0 1F0 1B0 1SEND_B0
"""


def test_good_schedule() -> None:
    validate(Schedule.from_text(GOOD))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0F0", "0F0 2F0", "rank 0, action 2: 2F0 names stage 2 of 2"),
        ("0F0", "0F0 1F0", "rank 0, action 2: 1F0 does not belong here: rank 1 holds stage 1"),
        ("0F0", "0F0 0F0", "rank 0, action 2: 0F0 stands more than once"),
        ("1SEND_B0", "1SEND_B0 1SEND_B0", "rank 1, action 5: 1SEND_B0 stands more than once"),
        ("1F0", "", "1[BF]0: stage 1, micro-batch 0 has no forward"),
        ("1B0", "", "1[BF]0: stage 1, micro-batch 0 has no backward, though others have"),
        ("1B0", "1B0 1W0", "stage 1, micro-batch 0 has backward actions B, W: give one B, or one I and one W"),
        ("1B0", "1I0", "has backward actions I: give one B, or one I and one W"),
        ("0B0", "0W0", "has backward actions W: give one B, or one I and one W"),
        ("1RECV_F0", "", "rank 0, action 2: 0SEND_F0 has no matching receive 1RECV_F0 on rank 1"),
        ("0SEND_F0", "", "rank 1, action 1: 1RECV_F0 has no matching send 0SEND_F0 on rank 0"),
        ("1SEND_B0", "", "rank 0, action 3: 0RECV_B0 has no matching send 1SEND_B0 on rank 1"),
        ("1SEND_B0", "1SEND_F0", "rank 0, action 3: 0RECV_B0 has no matching send 1SEND_B0"),
        ("1B0", "1B0 1SEND_F0", "rank 1, action 4: 1SEND_F0 has no other rank at its other end"),
        ("0F0", "0RECV_F0 0F0", "rank 0, action 1: 0RECV_F0 has no other rank at its other end"),
        ("0B0", "0B0 0SEND_B0", "rank 0, action 5: 0SEND_B0 has no other rank at its other end"),
        ("1RECV_F0 1F0", "1F0 1RECV_F0", "rank 1, action 1: 1F0 stands before 1RECV_F0, which it needs"),
        ("0RECV_B0 0B0", "0B0 0RECV_B0", "rank 0, action 3: 0B0 stands before 0RECV_B0, which it needs"),
        ("0F0 0SEND_F0", "0SEND_F0 0F0", "rank 0, action 1: 0SEND_F0 stands before 0F0, which it needs"),
        ("1B0 1SEND_B0", "1SEND_B0 1B0", "rank 1, action 3: 1SEND_B0 stands before 1B0, which it needs"),
        ("1F0 1B0", "1B0 1F0", "rank 1, action 2: 1B0 stands before 1F0, which it needs"),
        ("1B0", "1W0 1I0", "rank 1, action 3: 1W0 stands before 1I0, which it needs"),
        ("1F0", "1R0 1F0", "rank 1, action 2: 1R0 stands before 1F0, which it needs"),
        ("1SEND_B0", "1SEND_B0 1R0", "rank 1, action 3: 1B0 stands before 1R0, which it needs"),
    ],
)
def test_one_fault(old: str, new: str, message: str) -> None:
    assert old in GOOD
    broken = Schedule.from_text(GOOD.replace(old, new))
    with pytest.raises(ScheduleError, match=message):
        validate(broken)


def test_remote_input_without_message() -> None:
    with pytest.raises(
        ScheduleError, match="rank 1, action 1: 1F0 has its input on another rank and no receive 1RECV_F0"
    ):
        validate(Schedule.from_text("0F0\n1F0"))
    with pytest.raises(
        ScheduleError, match="rank 0, action 3: 0I0 has its input on another rank and no receive 0RECV_B0"
    ):
        validate(Schedule.from_text("0F0 0SEND_F0 0I0 0W0\n1RECV_F0 1F0 1B0"))


def test_micro_batch_beyond_the_schedule() -> None:
    schedule = replace(build_schedule("gpipe", 2, 3), num_micro_batches=2)
    with pytest.raises(ScheduleError, match="rank 0, action 5: 0F2 names micro-batch 2 of 2"):
        validate(schedule)


def test_micro_batch_that_nobody_runs() -> None:
    schedule = replace(build_schedule("gpipe", 2, 3), num_micro_batches=4)
    with pytest.raises(ScheduleError, match="rank 0: stage 0, micro-batch 3 has no forward"):
        validate(schedule)


def test_forward_only_has_no_backward_part() -> None:
    validate(Schedule.from_text("0F0 0SEND_F0\n1RECV_F0 1F0"))
    with pytest.raises(ScheduleError, match=r"stage 1, micro-batch 0 has a recompute \(R\) and no backward"):
        validate(Schedule.from_text("0F0 0SEND_F0\n1RECV_F0 1F0 1R0"))
    with pytest.raises(ScheduleError, match="0RECV_B0 carries a gradient in a schedule without backward"):
        validate(Schedule.from_text("0F0 0SEND_F0 0RECV_B0\n1RECV_F0 1F0 1SEND_B0"))


def test_a_recompute_stands_once_between_its_forward_and_its_backward() -> None:
    validate(Schedule.from_text("0F0 0F1 0R1 0B0 0I1 0W1"))
    for text, why in {
        "0F0 0R0 0R0 0B0": "action 3: 0R0 stands more than once",
        "0R0 0F0 0B0": "action 1: 0R0 stands before 0F0, which it needs",
        "0F0 0B0 0R0": "action 2: 0B0 stands before 0R0, which it needs",
        "0F0 0I0 0R0 0W0": "action 2: 0I0 stands before 0R0, which it needs",
        "0F0 0R0": r"a recompute \(R\) and no backward",
        "0F0 0B0 0F1 0R1": r"a recompute \(R\) and no backward",
        "0F0 0B0 0R1": "micro-batch 1 has no forward",
    }.items():
        with pytest.raises(ScheduleError, match=why):
            validate(Schedule.from_text(text))


def test_neighbours_on_one_rank() -> None:
    with pytest.raises(ScheduleError, match="0SEND_F0 has no other rank at its other end"):
        validate(Schedule.from_text("0F0 0SEND_F0 1RECV_F0 1F0", stage_to_rank=(0, 0)))
    with pytest.raises(ScheduleError, match="rank 0, action 1: 1F0 stands before 0F0, which it needs"):
        validate(Schedule.from_text("1F0 0F0", stage_to_rank=(0, 0)))


def test_ranks_that_disagree_on_the_order_of_messages() -> None:
    text = """
        0F0 0SEND_F0 0F1 0SEND_F1
        1RECV_F1 1RECV_F0 1F0 1F1
    """
    with pytest.raises(
        ScheduleError,
        match=r"rank 0, action 2: ranks 0 and 1 post .* where rank 0 has the message of 0SEND_F0, rank 1 .*",
    ):
        validate(Schedule.from_text(text))


def test_order_of_messages_counts_both_directions() -> None:
    """Each direction alone agrees, and every input is posted in time; but the channel carries them in one order."""
    text = """
        0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1
        1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1
    """
    with pytest.raises(ScheduleError, match="rank 0 has the message of 0SEND_F1, rank 1 has that of 1SEND_B0"):
        validate(Schedule.from_text(text))


def test_deadlock_around_three_ranks() -> None:
    """No rule on one or two ranks is broken: rank 0 waits for rank 2, which waits for 1, which waits for 0."""
    text = """
        3RECV_F0 3F0 0F0 0SEND_F0
        1RECV_F0 1F0 1SEND_F0
        2RECV_F0 2F0 2SEND_F0
    """
    with pytest.raises(ScheduleError, match=r"can make no progress \(deadlock\): .*arrival of 3RECV_F0"):
        validate(Schedule.from_text(text, stage_to_rank=(0, 1, 2, 0)))


def test_messages_with_different_ranks_go_one_after_the_other() -> None:
    """As on NCCL. Rank 0 sends its third micro-batch before it takes its first back from rank 2, which has yet to send
    it on before it takes the second from rank 1, which has yet to send that before it takes the third from rank 0.
    """
    text = """
        0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2 3RECV_F0 3F0 3RECV_F1 3F1 3RECV_F2 3F2
        1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 1RECV_F2 1F2 1SEND_F2
        2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 2RECV_F2 2F2 2SEND_F2
    """
    schedule = Schedule.from_text(text, stage_to_rank=(0, 1, 2, 0))
    assert execution_order(schedule, dependency_graph(schedule))  # with a channel per pair of ranks it would run
    with pytest.raises(ScheduleError, match=r"can make no progress \(deadlock\): .*arrival of 1RECV_F2"):
        validate(schedule)
    early = text.replace("0F2 0SEND_F2 3RECV_F0", "3RECV_F0 0F2 0SEND_F2")
    validate(Schedule.from_text(early, stage_to_rank=(0, 1, 2, 0)))


def test_activation_budget() -> None:
    schedule = build_schedule("1f1b", 4, 8)
    validate(schedule, activation_budget=4)
    with pytest.raises(ScheduleError, match="rank 0: 4 activations alive at once, above the budget of 3"):
        validate(schedule, activation_budget=3)
