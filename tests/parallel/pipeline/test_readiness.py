"""The rule by which a rank chooses among what is ready: orders are kept, the cap holds, nothing gets stuck."""

import random
from collections import Counter, defaultdict

import pytest

from parallel.pipeline import SCHEDULES, Action, ActionKind, Schedule, ScheduleError, build_schedule
from parallel.pipeline.actions import live_activations, recomputed_ahead
from parallel.pipeline.readiness import Chooser, check_lanes
from tests.parallel.pipeline.orders import in_any_order

INPUT = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
WEIGHT = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)


class Lanes:
    """What has been sent to whom; a message comes in when the test says so, each lane's in the order of sending."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.sent: dict[tuple[bool, int], list[int]] = defaultdict(list)
        self.arrived: Counter[tuple[bool, int]] = Counter()
        self.taken: Counter[tuple[bool, int]] = Counter()

    def has_arrived(self, action: Action) -> bool:
        lane = action.kind is ActionKind.FORWARD, action.stage
        assert action.micro_batch is not None
        if self.arrived[lane] == self.taken[lane]:
            return False
        assert self.sent[lane][self.taken[lane]] == action.micro_batch, f"{action} is not next of its lane"
        return True

    def run(self, action: Action) -> None:
        forward = action.kind is ActionKind.FORWARD
        if not (forward or action.kind in INPUT):
            return
        step = 1 if forward else -1
        if self.schedule.crosses_ranks(action.stage, action.stage - step):
            self.taken[forward, action.stage] += 1
        if self.schedule.crosses_ranks(action.stage, action.stage + step):
            assert action.micro_batch is not None
            self.sent[forward, action.stage + step].append(action.micro_batch)

    def on_the_way(self) -> list[tuple[bool, int]]:
        return [lane for lane, messages in self.sent.items() if self.arrived[lane] < len(messages)]


def run_at_random(schedule: Schedule, draw: random.Random) -> list[list[Action]]:
    """One pass in which ranks and messages move in any order; what each rank ran. Fails where nothing can move."""
    check_lanes(schedule)
    lanes, choosers = Lanes(schedule), [Chooser(schedule, rank) for rank in range(schedule.num_ranks)]
    ran: list[list[Action]] = [[] for _ in choosers]
    favourite = draw.randrange(schedule.num_ranks)  # moves far more often than the others: gets as far ahead as it can
    while not all(chooser.is_finished for chooser in choosers):
        moves: list[tuple[int, int]] = []
        for rank, chooser in enumerate(choosers):
            position = chooser.choose(lanes.has_arrived)
            if position is not None:
                moves += [(rank, position)] * (50 if rank == favourite else 1)
        on_the_way = lanes.on_the_way()
        assert moves or on_the_way, f"stuck after {ran} of\n{schedule}"
        if on_the_way and (not moves or draw.random() < 0.5):
            lanes.arrived[draw.choice(on_the_way)] += 1
            continue
        rank, position = draw.choice(moves)
        action = choosers[rank].take(position)
        lanes.run(action)
        ran[rank].append(action)
        assert 0 <= choosers[rank].live <= choosers[rank].cap
    return ran


def check_pass(schedule: Schedule, ran: list[list[Action]]) -> None:
    for rank, actions in enumerate(ran):
        program = [a for a in schedule.ranks[rank] if a.kind.is_compute]
        overtaken = Counter(program) - Counter(actions)
        assert not Counter(actions) - Counter(program)
        assert all(a.kind is ActionKind.RECOMPUTE for a in overtaken)
        assert max(recomputed_ahead(actions)) <= max(recomputed_ahead(program))
        assert max(live_activations(schedule, rank, actions)) <= max(live_activations(schedule, rank))
        for stage in schedule.stages_of(rank):
            for kinds in ((ActionKind.FORWARD,), INPUT, WEIGHT):
                orders = [[a for a in order if a.stage == stage and a.kind in kinds] for order in (actions, program)]
                assert orders[0] == orders[1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (2, 5), (3, 6), (4, 9)])
def test_generated_schedules(name: str, p: int, m: int) -> None:
    schedule = build_schedule(name, p, m)
    for seed in range(4):
        check_pass(schedule, run_at_random(schedule, random.Random(seed)))


def random_schedule(seed: int) -> Schedule:
    """Any placement, mix of backwards and recomputes; any order that dependencies and one order per lane allow."""
    draw = random.Random(seed)
    num_ranks, num_micro_batches = draw.randint(1, 3), draw.randint(1, 4)
    placement = [*range(num_ranks), *(draw.randrange(num_ranks) for _ in range(draw.randint(0, 3)))]
    draw.shuffle(placement)
    orders = [draw.sample(range(num_micro_batches), num_micro_batches) for _ in range(2)]
    waiting: list[list[Action]] = []  # in each list one after the other
    for stage in range(len(placement)):
        ways = {m: draw.choice(["B", "IW", "RB", "RIW"]) for m in range(num_micro_batches)}
        queues: dict[str, list[Action]] = {"F": [Action(ActionKind.FORWARD, stage, m) for m in orders[0]]}
        for queue, kinds in (("I", "RBI"), ("W", "W")):
            queues[queue] = [Action(ActionKind(k), stage, m) for m in orders[1] for k in ways[m] if k in kinds]
        waiting += queues.values()
    return in_any_order(draw, f"random {seed}", waiting, placement, num_micro_batches)


def test_random_schedules() -> None:
    for seed in range(300):
        schedule = random_schedule(seed)
        check_pass(schedule, run_at_random(schedule, random.Random(seed)))


def test_a_count_alone_would_get_stuck() -> None:
    """Two stages on rank 0 with room for two activations: the first may not take both with forwards of its own."""
    text = "0F0 2F0 2B0 0B0 0F1 2F1 2B1 0B1\n1F0 1B0 1F1 1B1"
    chooser = Chooser(Schedule.from_text(text, stage_to_rank=(0, 1, 0)), 0)
    assert chooser.cap == 2
    assert [chooser.choose(lambda _: False)] == [0]
    chooser.take(0)
    assert chooser.choose(lambda _: False) is None  # 0F1 is ready and would be the second
    assert chooser.awaited() == [Action.parse("2F0")]
    assert chooser.choose(lambda _: True) == 1


def run_with(chooser: Chooser, *arrivals: str) -> list[str]:
    """What a rank runs if the messages of these actions are here and no others come."""
    chooser.restart()
    ran = []
    while (position := chooser.choose(lambda action: str(action) in arrivals)) is not None:
        ran.append(str(chooser.take(position)))
    return ran


def test_what_is_ready_runs_in_the_place_of_what_is_not() -> None:
    chooser = Chooser(Schedule.from_text("0F0 0F1 0I0 0W0 0I1 0W1\n1F0 1I0 1F1 1W0 1I1 1W1"), 1)
    assert run_with(chooser, "1F0", "1F1") == ["1F0", "1I0", "1F1", "1W0", "1I1", "1W1"]
    assert run_with(chooser, "1F0") == ["1F0", "1I0", "1W0"]
    assert chooser.awaited() == [Action.parse("1F1")]


def test_what_does_not_run_ahead_on_a_rank_with_one_stage() -> None:
    """A backward of a forward; a forward or weight gradient of an input gradient."""
    backward = Chooser(Schedule.from_text("0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3\n1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"), 0)
    assert run_with(backward, "0B1") == ["0F0", "0F1", "0F2"]
    order = "0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2\n1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2"
    assert run_with(Chooser(Schedule.from_text(order), 0), "0I0") == ["0F0", "0F1", "0I0", "0F2"]


def test_a_recompute_fills_a_wait_and_is_overtaken_by_its_backward() -> None:
    """It runs where nothing else is to be done but later weight gradients, and not where the gradient is here."""
    order = "0F0 0F1 0R0 0I0 0F2 0R1 0I1 0W0 0R2 0I2 0W1 0W2\n1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2"
    chooser = Chooser(Schedule.from_text(order), 0)
    assert run_with(chooser) == ["0F0", "0F1", "0R0"]  # 0R1 would be the second that lies ahead
    assert chooser.awaited() == [Action.parse("0I0")]
    assert run_with(chooser, "0I0") == ["0F0", "0F1", "0I0", "0F2", "0R1"]
    assert run_with(chooser, "0I0", "0I1") == ["0F0", "0F1", "0I0", "0F2", "0I1", "0W0", "0R2"]
    assert run_with(chooser, "0I0", "0I1", "0I2")[-2:] == ["0W1", "0W2"] and chooser.is_finished


def test_several_stages_have_more_freedom() -> None:
    """Rank 0 of ZB-V waits for the gradient of one micro-batch: it runs forwards and weight gradients of others."""
    chooser = Chooser(
        Schedule.from_text(
            "0F0 3F0 3I0 0F1 3F1 0I0 3W0 0W0 3I1 0I1 3W1 0W1\n1F0 2F0 2I0 1I0 2W0 1W0 1F1 2F1 2I1 1I1 2W1 1W1",
            stage_to_rank=(0, 1, 1, 0),
        ),
        0,
    )
    assert run_with(chooser, "3F0", "3F1") == ["0F0", "3F0", "3I0", "0F1", "3F1", "3W0", "3I1", "3W1"]


def test_weight_gradients_keep_their_order_across_kinds() -> None:
    """A whole backward of one micro-batch may not overtake the weight gradient of an earlier one."""
    chooser = Chooser(Schedule.from_text("0F0 0F1 0I0 0W0 0B1\n1F0 1F1 1B0 1B1"), 0)
    order = [chooser.take(p) for _ in range(5) if (p := chooser.choose(lambda _: True)) is not None]
    assert list(map(str, order)) == ["0F0", "0F1", "0I0", "0W0", "0B1"]
    with pytest.raises(AssertionError, match="0B1 is not next"):
        chooser.restart()
        chooser.take(4)


def test_lanes_with_two_orders_are_refused() -> None:
    text = "0F0 0F1 0B1 0B0\n1F1 1B1 1F0 1B0"
    with pytest.raises(ScheduleError, match="stages 0 and 1 take their micro-batches forward in different orders"):
        check_lanes(Schedule.from_text(text))
    text = "0F0 0F1 0B0 0B1\n1F0 1F1 1B1 1B0"
    with pytest.raises(ScheduleError, match=r"backward in different orders \(0 at the one where the other has 1\)"):
        check_lanes(Schedule.from_text(text))
