"""Actions and schedules as text, and the shape checks of a schedule."""

import pytest

from parallel.pipeline import Action, ActionKind, Schedule, build_schedule
from parallel.pipeline.actions import live_activations, peak_activations, recomputed_ahead


@pytest.mark.parametrize("kind", ActionKind)
def test_action_round_trip(kind: ActionKind) -> None:
    action = Action(kind, 12, None if kind.is_whole_stage else 345)
    assert Action.parse(str(action)) == action


def test_action_notation() -> None:
    assert str(Action(ActionKind.FORWARD, 2, 0)) == "2F0"
    assert str(Action(ActionKind.SEND_BACKWARD, 1, 3)) == "1SEND_B3"
    assert str(Action(ActionKind.REDUCE, 4)) == "4REDUCE"


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2f0", "-1F0", "2F0 2F1", "2SEND_F0x"])
def test_text_that_is_no_action(text: str) -> None:
    with pytest.raises(ValueError, match="is no action"):
        Action.parse(text)


@pytest.mark.parametrize(("text", "message"), [("2F", "needs a micro-batch"), ("2REDUCE0", "takes no micro-batch")])
def test_micro_batch_where_it_belongs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Action.parse(text)


@pytest.mark.parametrize(("one", "other"), [("1SEND_F5", "2RECV_F5"), ("3SEND_B0", "2RECV_B0")])
def test_counterparts(one: str, other: str) -> None:
    assert Action.parse(one).counterpart == Action.parse(other)
    assert Action.parse(other).counterpart == Action.parse(one)


def test_schedule_round_trip() -> None:
    schedule = build_schedule("1f1b", 3, 5)
    assert len(str(schedule).splitlines()) == 3
    assert Schedule.from_text(str(schedule), name="1f1b") == schedule


def test_from_text_with_several_stages_per_rank() -> None:
    schedule = Schedule.from_text("0F0 3F0 \n\n rank 1: 1F0 2F0 \n", stage_to_rank=[0, 1, 1, 0])
    assert (schedule.num_stages, schedule.num_ranks, schedule.num_micro_batches) == (4, 2, 1)
    assert [schedule.stages_of(rank) for rank in range(2)] == [(0, 3), (1, 2)]
    assert schedule.peer(Action.parse("0SEND_F0")) == 1
    assert schedule.is_forward_only
    assert schedule.crosses_ranks(0, 1) and schedule.crosses_ranks(3, 2)
    assert not any(schedule.crosses_ranks(*pair) for pair in [(1, 2), (0, -1), (3, 4)])


@pytest.mark.parametrize("stage_to_rank", [(0,), (0, 0), (0, 2), (0, 1, 2)])
def test_placement_that_does_not_fit(stage_to_rank: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not place"):
        Schedule.from_text("0F0\n1F0", stage_to_rank=stage_to_rank)


@pytest.mark.parametrize(
    ("program", "counts"),
    [
        ("0F0 0F1 0B0 0B1", [1, 2, 1, 0]),
        ("0F0 0F1 0I0 0I1 0W0 0W1", [1, 2, 2, 2, 1, 0]),
        ("0F0 0F1 0R0 0B0 0R1 0B1", [1, 2, 2, 1, 1, 0]),
        ("0F0 0F1", [0, 0]),
    ],
)
def test_life_of_activations(program: str, counts: list[int]) -> None:
    assert live_activations(Schedule.from_text(program), 0) == counts


def test_what_lies_recomputed() -> None:
    program = Schedule.from_text("0F0 0F1 0R0 0R1 0I0 0W0 0B1 0F2 0B2").ranks[0]
    assert recomputed_ahead(program) == [0, 0, 1, 2, 1, 1, 0, 0, 0]


def test_peak_is_in_shares_of_a_rank() -> None:
    schedule = Schedule.from_text("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1", stage_to_rank=(0, 0))
    assert peak_activations(schedule) == (2.0,)
