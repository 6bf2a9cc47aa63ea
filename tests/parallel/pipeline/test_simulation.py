"""The simulator against the closed forms of the literature."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from parallel.pipeline import (
    ActionKind,
    Costs,
    Schedule,
    ScheduleError,
    behind_forwards,
    build_schedule,
    compute_order,
    forward_only,
    insert_communication,
    simulate,
)
from parallel.pipeline.actions import Place
from parallel.pipeline.graph import Arrival, Node, dependency_graph, execution_order
from parallel.pipeline.progress import Progress
from parallel.pipeline.readiness import Policy
from parallel.pipeline.schedules import SCHEDULES

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, 5, 8, 16)]
TIMES = [(1.0, 1.0, 1.0), (1.0, 1.5, 0.5), (3.0, 1.0, 0.25)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(("f", "b", "w"), TIMES)
def test_bubble_of_gpipe_and_1f1b(name: str, p: int, m: int, f: float, b: float, w: float) -> None:
    timeline = simulate(build_schedule(name, p, m), Costs(forward=f, backward_input=b, backward_weight=w))
    assert timeline.makespan == pytest.approx((m + p - 1) * (f + b + w))
    assert timeline.bubble == pytest.approx([(p - 1) * (f + b + w)] * p)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("policy", ["static", "ready"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_pass_of_forwards_before_takes_the_time_of_its_forwards(name: str, policy: Policy, times: int) -> None:
    """At least; and no more than it would take alone, as the pass behind it fills while it drains."""
    p, m = 4, 8
    schedule = build_schedule(name, p, m)
    costs, stages = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0), schedule.num_stages // p
    alone, behind = (simulate(of, costs, policy) for of in (schedule, behind_forwards(schedule, times)))
    assert behind_forwards(schedule, 0) == schedule
    more = behind.makespan - alone.makespan
    first = simulate(forward_only(p, times * m, stage_to_rank=schedule.stage_to_rank), costs).makespan
    assert times * m * stages <= more <= first
    busy = [sum(i.end - i.start for i in of) for of in behind.ranks]
    assert busy == pytest.approx([m * stages * (3 + times)] * p)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_peak_activations(p: int, m: int) -> None:
    assert simulate(build_schedule("gpipe", p, m), Costs()).peak_activations == (m,) * p
    expected = tuple(min(m, p - rank) for rank in range(p))
    assert simulate(build_schedule("1f1b", p, m), Costs()).peak_activations == expected


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("latency", [0.125, 0.5, 1.0])
def test_latency(p: int, m: int, latency: float) -> None:
    """Messages no longer than a forward cost what the schedule itself makes them cost: they never queue or come late.

    In GPipe those are the first and last ones; in 1F1B on two ranks also a round trip for every two micro-batches.
    """
    costs = Costs(latency=latency)
    ends = 3 * (m + p - 1) + 2 * (p - 1) * latency
    assert simulate(build_schedule("gpipe", p, m), costs).makespan == pytest.approx(ends)
    one_f_one_b = simulate(build_schedule("1f1b", p, m), costs).makespan
    assert one_f_one_b == pytest.approx(simulate(compute_order("1f1b", p, m), costs).makespan)
    if p == 2:
        assert one_f_one_b == pytest.approx(ends + 2 * ((m - 1) // 2) * latency)


def test_zero_bubble_by_hand() -> None:
    """ZB-H1 of two ranks and micro-batches: bubble (p-1)(F+B-W), peak p on rank 0."""
    order = Schedule.from_text("0F0 0F1 0I0 0W0 0I1 0W1\n1F0 1I0 1F1 1I1 1W0 1W1")
    timeline = simulate(insert_communication(order), Costs())
    assert timeline.makespan == 7
    assert timeline.bubble == (1, 1)
    assert timeline.peak_activations == (2, 2)


def test_interleaved_by_hand() -> None:
    """p = v = m = 2: bubble of 1F1B over v, peak min(mv, (v-1)p + 2(p-r-1) + 1)/v."""
    text = "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"
    schedule = insert_communication(Schedule.from_text(text, stage_to_rank=(0, 1, 0, 1)))
    timeline = simulate(schedule, Costs(forward=0.5, backward_input=0.5, backward_weight=0.5))
    assert timeline.bubble == (1.5, 1.5)
    assert timeline.peak_activations == (2.0, 1.5)


def test_costs_per_stage_and_recompute() -> None:
    order = Schedule.from_text("0F0 0R0 0B0\n1F0 1B0")
    costs = Costs(forward=(1.0, 10.0), backward_input=(2.0, 20.0), backward_weight=3.0, recompute=5.0, latency=0.5)
    timeline = simulate(insert_communication(order), costs)
    times = [[(str(i.action), i.start, i.end) for i in intervals] for intervals in timeline.ranks]
    # The recompute fills the wait for the gradient, which comes 0.5 after 39.5: the other backward recomputes within.
    assert times == [
        [("0F0", 0, 1), ("0R0", 1, 6), ("0B0", 40, 45)],
        [("1F0", 1.5, 11.5), ("1B0", 11.5, 39.5)],
    ]


def test_messages_between_two_ranks_queue() -> None:
    schedule = Schedule.from_text("0F0 0SEND_F0 0F1 0SEND_F1\n1RECV_F0 1RECV_F1 1F0 1F1")
    ends = [i.end for i in simulate(schedule, Costs(latency=10.0)).ranks[1]]
    assert ends == [12, 22]


def test_a_late_receive_costs_time() -> None:
    early = Schedule.from_text("0F0 0SEND_F0 0F1 0SEND_F1\n1RECV_F0 1RECV_F1 1F0 1F1")
    late = Schedule.from_text("0F0 0SEND_F0 0F1 0SEND_F1\n1RECV_F0 1F0 1RECV_F1 1F1")
    costs = Costs(latency=1.0)
    assert simulate(late, costs).makespan == simulate(early, costs).makespan + 1


def test_compute_order_alone_has_ideal_links() -> None:
    order = Schedule.from_text("0F0 0F1\n1F0 1F1")
    assert [interval.end for interval in simulate(order, Costs(latency=10.0)).ranks[1]] == [12, 13]


def test_deadlock_is_reported() -> None:
    with pytest.raises(ScheduleError, match="no progress"):
        simulate(Schedule.from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"), Costs())


def test_picture() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 2), Costs())
    assert timeline.render() == "rank 0 |F0 F1 ......B0--- ...B1--- |\nrank 1 |...F0 B0--- F1 B1--- ......|"
    assert "bubble 33.3%, peak activations per rank 2 1" in str(timeline)


def test_picture_names_stages_where_needed_and_keeps_its_width() -> None:
    text = "0F0 1F0 1B0 0B0"
    timeline = simulate(Schedule.from_text(text, stage_to_rank=(0, 0)), Costs())
    assert timeline.render() == "rank 0 |0F0 1F0 1B0---- 0B0---- |"
    for columns in (1, 5, 60):
        assert len(timeline.render(columns)) == len("rank 0 ||") + columns


def test_costs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="forward is -1"):
        Costs(forward=-1.0)
    with pytest.raises(ValueError, match="recompute"):
        Costs(recompute=(1.0, float("nan")))
    with pytest.raises(ValueError, match="forward has 3 entries for 2 stages"):
        simulate(build_schedule("gpipe", 2, 2), Costs(forward=(1.0, 1.0, 1.0)))


def test_picture_shows_every_label_when_times_fall_between_columns() -> None:
    rows = simulate(build_schedule("gpipe", 3, 4), Costs(latency=0.5)).render().splitlines()
    for row in rows:
        assert all(f"F{m} " in row and f"B{m}--- " in row for m in range(4))


def ends_by_graph(schedule: Schedule, latency: float, *, one_channel: bool) -> list[list[float]]:
    """The ends of compute actions, by the longest path through the graph. Raises ScheduleError for a circle."""
    graph = dependency_graph(schedule, one_channel=one_channel)
    ends: dict[Node, float] = {}
    for node in execution_order(schedule, graph):
        if isinstance(node, Arrival):
            duration = latency
        else:
            duration = float(schedule.ranks[node.rank][node.position].kind.is_compute)
        ends[node] = max((ends[before] for before in graph[node]), default=0.0) + duration
    return [
        [ends[Place(rank, i)] for i, action in enumerate(program) if action.kind.is_compute]
        for rank, program in enumerate(schedule.ranks)
    ]


def shuffled(schedule: Schedule, draw: random.Random) -> Schedule:
    """The same with an action or message of some ranks in another place."""
    programs = [list(program) for program in schedule.ranks]
    for program in programs:
        if program and draw.random() < 0.5:
            program.insert(draw.randrange(len(program)), program.pop(draw.randrange(len(program))))
    return replace(schedule, ranks=tuple(map(tuple, programs)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_the_longest_paths_through_the_graph(name: str) -> None:
    """Of good programs, and of spoilt ones, of which some still run and others are in a circle."""
    draw, costs = random.Random(name), Costs(backward_weight=0.0, latency=0.25)  # each action takes 1
    outcomes = Counter[bool]()
    for p, m in [(1, 2), (2, 3), (3, 4), (4, 6)]:
        order = compute_order(name, p, m)
        if any(a.kind is ActionKind.BACKWARD_WEIGHT for a in order.ranks[0]):
            costs = Costs(latency=0.25)
        good = [order, insert_communication(order)]
        for schedule in [*good, *(shuffled(draw.choice(good), draw) for _ in range(30))]:
            for one_channel in (False, True):
                progress = Progress(schedule, costs, one_channel=one_channel)
                outcomes[progress.is_complete] += 1
                if progress.is_complete:
                    expected = ends_by_graph(schedule, 0.25, one_channel=one_channel)
                    assert [list(ends) for ends in progress.ends] == expected
                else:
                    with pytest.raises(ScheduleError, match="no progress"):
                        ends_by_graph(schedule, 0.25, one_channel=one_channel)
    assert min(outcomes[True], outcomes[False]) > 20
