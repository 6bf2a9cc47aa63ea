"""The executor on 1, 2 and 4 ranks, with small stages that pass two tensors with a gradient, and an integer and a
floating-point one without. Gradients are compared bit for bit with those that one process adds up in the same order,
under both policies; while the ready one is tested, stages sleep.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.failures import PeerLostError
from parallel.grid import Grid, GridShape, make_grid
from parallel.pipeline import (
    Action,
    ActionKind,
    Costs,
    Schedule,
    ScheduleError,
    build_schedule,
    forward_only,
    insert_communication,
    ready,
    validate,
    with_recompute,
)
from parallel.pipeline.actions import peak_activations
from parallel.pipeline.boundary import Route
from parallel.pipeline.execution import PipelineExecutor, TensorSpec
from parallel.pipeline.host_lanes import SLOTS
from parallel.pipeline.local_stage import Products
from parallel.pipeline.post import SENDS_IN_FLIGHT
from parallel.pipeline.readiness import Policy
from parallel.process_group import World
from parallel.random import uniform
from parallel.sharding import ParameterStore, ShardingPolicy
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel
from tests.distributed import run_ranks

CPU = torch.device("cpu")
BATCH, WIDTH, SIDE = 3, 4, 2
BOUNDARY = (
    TensorSpec((BATCH, WIDTH)),
    TensorSpec((BATCH,), torch.int64, carries_gradient=False),
    TensorSpec((BATCH, SIDE)),
    TensorSpec((BATCH, WIDTH), carries_gradient=False),
)
Tensors = tuple[Tensor, ...]


class _Passing(torch.autograd.Function):
    """Identity; tells the stage of its backward, and has ranks meet in both directions, all at the same action."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "TinyStage", m: int) -> Tensor:
        ctx.stage, ctx.m = stage, m
        if stage.meeting is not None:
            _all_at(100 * stage.number + m, stage.meeting)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.stage.before_backward(ctx.stage, ctx.m)
        ctx.stage.done.append(f"{ctx.stage.number}B{ctx.m}")
        if ctx.stage.meeting is not None:
            _all_at(-100 * ctx.stage.number - ctx.m, ctx.stage.meeting)
        return grads[0], None, None


def _all_at(code: int, axis: Axis) -> None:
    codes = comm.all_gather_rows(torch.tensor([code]), axis).view(-1).tolist()
    assert codes == [code] * axis.size, codes


class Notes:
    """A list that is open while a stage notes what it drops (parallel.pipeline.local_stage.Recomputer)."""

    products: Products | None = None

    @contextmanager
    def noting(self) -> Iterator[Products]:
        """As Recomputer."""
        self.products = []
        yield self.products
        self.products = None


class TinyStage(nn.Module):
    """Mixes its inputs so that a wrong tensor, order or gradient shows; remembers the storage of what it gave.

    Attributes:
        kept: what its forwards made for their backwards (the input of a linear, which the weight's gradient reads).
        before, before_backward: called with each micro-batch. meeting: ranks that are all to be at the same action.
        notes: who is told what is to be called to recompute. done: recomputes and backwards.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.main = ColumnParallelLinear(WIDTH, (WIDTH,), tp=no_tensor_parallel())
        self.side = ColumnParallelLinear(WIDTH, (SIDE,), tp=no_tensor_parallel())
        self.given: list[StorageWeakRef] = []
        self.kept: list[StorageWeakRef] = []
        self.most_alive = 0
        self.before: Callable[[TinyStage, int], None] = lambda _stage, _m: None
        self.before_backward = self.before
        self.meeting: Axis | None = None
        self.notes = Notes()
        self.done: list[str] = []

    def _again(self, m: int) -> None:
        self.done.append(f"{self.number}R{m}")
        if self.meeting is not None:
            _all_at(10000 + 100 * self.number + m, self.meeting)

    def forward(self, inputs: Tensors, micro_batch: Tensor) -> Tensors:
        m = int(micro_batch[0, 0] * 1000)
        self.before(self, m)
        self.most_alive = max(self.most_alive, sum(not ref.expired() for ref in self.given))
        assert (len(inputs) == len(BOUNDARY)) == (self.number > 0)
        x, count, side, frozen = inputs or (
            micro_batch,
            torch.arange(BATCH),
            micro_batch.new_ones(BATCH, SIDE),
            micro_batch,
        )
        assert not frozen.requires_grad
        assert count.tolist() == [i + self.number for i in range(BATCH)]
        scale = (1 + count % 2)[:, None]
        y = self.main(x) + scale * side.sum(1, keepdim=True) + frozen
        waves = x.sin()
        out = (y, count + 1, self.side(waves) * side, frozen + y.detach())
        self.given += [StorageWeakRef(t.untyped_storage()) for t in out]
        self.kept.append(StorageWeakRef(waves.untyped_storage()))
        if self.notes.products is not None:
            self.notes.products.append(partial(self._again, m))
        return _Passing.apply(out[0], self, m), *out[1:]


def _head(outputs: Tensors, micro_batch: Tensor) -> Tensor:
    y, count, side, frozen = outputs
    return (y.square().sum(1) * count).sum() + side.sum() + y.sum() * micro_batch.sum() + (y * frozen).sum()


def _micro_batches(count: int, seed: int = 0) -> list[Tensor]:
    """Each knows its number."""
    values = torch.randn(count, BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))
    values[:, 0, 0] = (torch.arange(count) + 0.5) / 1000
    return list(values)


def _stages(numbers: Sequence[int], grid: Grid | None = None, zero: int = 0) -> tuple[nn.ModuleDict, ParameterStore]:
    """The stages with these numbers, each of two units, so that at ZeRO stage 3 buffers are too few for a rank's."""
    module = nn.ModuleDict({str(n): TinyStage(n) for n in numbers})
    policy = ShardingPolicy(stage=zero, reduce="micro_batch" if zero > 1 else "step", unit_bytes=0, gather=0.0)
    stages = [[(f"{n}.main", stage.main), (f"{n}.side", stage.side)] for n, stage in module.items()]
    return module, ParameterStore(stages, grid=grid or make_grid(GridShape()), device=CPU, seed=0, policy=policy)


def _gradients(num_stages: int, micro_batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients of one process without any executor."""
    module, store = _stages(range(num_stages))
    store.gradients.start(len(micro_batches))
    losses = []
    for micro_batch in micro_batches:
        flowing: Tensors = ()
        for stage in module.values():
            flowing = stage(flowing, micro_batch)
        losses.append(_head(flowing, micro_batch))
        losses[-1].backward()
    store.gradients.finish()
    return [loss.detach() for loss in losses], store.local_values("sums")


@cache
def _expected(
    num_stages: int, count: int, data: int, by_micro_batch: bool
) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """(losses of each data rank, gradients added up as the ranks do: each rank's micro-batches first, or, for each
    micro-batch, ranks first).
    """
    batches = [_micro_batches(count, seed) for seed in range(data)]
    losses = [_gradients(num_stages, own)[0] for own in batches]
    groups = [[[m] for m in own] for own in batches] if by_micro_batch else [[own] for own in batches]
    sums: dict[str, Tensor] = {}
    for of_ranks in zip(*groups, strict=True):
        parts = [_gradients(num_stages, group)[1] for group in of_ranks]
        for name in parts[0]:
            over_ranks = parts[0][name].clone()
            for part in parts[1:]:
                over_ranks += part[name]
            sums[name] = sums[name] + over_ranks if name in sums else over_ranks
    return losses, sums


@dataclass
class Case:
    """A schedule, and how it is run."""

    schedule: Schedule
    policy: Policy = "static"
    zero: int = 0
    jitter: float = 0.0
    """Seconds that a forward or backward may sleep."""
    slow: Mapping[tuple[int, int, int], float] = field(default_factory=dict)
    """(data rank, stage, micro-batch): seconds that this backward sleeps."""


@dataclass
class Ran:
    """What a rank has seen.

    Attributes:
        order: compute actions. most_alive: activations at once.
    """

    order: list[Action] = field(default_factory=list)
    most_alive: int = 0


@contextmanager
def _watched(axis: Axis) -> Iterator[list[Action]]:
    """The compute actions that run."""
    where, ran = axis.meter.where, []
    now = type(where).now

    def note(self: Any, doing: Any) -> None:
        if isinstance(doing, Action) and doing.kind.is_compute:
            ran.append(doing)
        now(self, doing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(where), "now", note)
        yield ran


def _check(case: Case, grid: Grid) -> Ran:
    """A training pass gives the bits of one process on every rank, twice, and so does an evaluation pass over the same
    placement; no more is alive than the schedule allows, and nothing in the end.
    """
    schedule, axis, rank, ran = case.schedule, grid.pipeline, grid.pipeline.index, Ran()
    validate(schedule)
    module, store = _stages(schedule.stages_of(rank), grid, case.zero)
    place: dict[int, TinyStage] = {int(number): stage for number, stage in module.items()}  # type: ignore[misc]
    boundaries = [(), *[BOUNDARY] * (schedule.num_stages - 1)]
    micro_batches = _micro_batches(schedule.num_micro_batches, grid.data.index)
    all_losses, expected = _expected(schedule.num_stages, schedule.num_micro_batches, grid.data.size, case.zero > 1)
    losses = all_losses[grid.data.index]
    together = ("data", "context", "tensor") if case.zero > 1 else ("context", "tensor")
    notes = Notes()
    executor = PipelineExecutor(
        schedule, place, boundaries, axis=axis, device=CPU, deferrer=store.gradients, before_run=store.plan,
        policy=case.policy, group=grid.along(*together), recomputer=notes,
    )  # fmt: skip

    def alive() -> int:
        return sum(not ref.expired() for stage in place.values() for ref in stage.kept)

    def before(stage: TinyStage, m: int) -> None:
        if torch.is_grad_enabled():
            ran.most_alive = max(ran.most_alive, alive() + 1)
            time.sleep(case.jitter * float(uniform(stage.number + 17 * grid.rank, torch.tensor([m]))))

    def before_backward(stage: TinyStage, m: int) -> None:
        time.sleep(case.jitter * float(uniform(stage.number + 17 * grid.rank, torch.tensor([-m - 1]))))
        time.sleep(case.slow.get((grid.data.index, stage.number, m), 0.0))

    for stage in place.values():
        stage.before, stage.before_backward, stage.meeting = before, before_backward, grid.tensor
        stage.notes = notes
    products, add = [], store.gradients._add_product
    store.gradients._add_product = lambda *args: (products.append(grid.meter.where.doing.kind.name), add(*args))[1]  # type: ignore
    for _ in range(2):  # an executor is used again at each step
        store.gradients.start(schedule.num_micro_batches)
        with _watched(axis) as ran.order:
            results = executor.run(micro_batches, _head)
        store.gradients.finish()
        found = store.local_values("sums")
        assert set(found) == {name for name in expected if int(name.split(".")[0]) in place}
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), f"{schedule.name}, {case}: {name} is {grad}, not {expected[name]}"
        assert not any(parameter.grad is not None for parameter in module.parameters())
        assert alive() == 0
        store.updated()
    assert set(products) == {a.kind.name for a in schedule.ranks[rank]} & {"BACKWARD", "BACKWARD_WEIGHT"}
    _check_order(case, ran.order, {number: stage.done for number, stage in place.items()}, rank)
    assert ran.most_alive == round(peak_activations(schedule)[rank] * len(place)) or case.policy == "ready"
    assert ran.most_alive <= round(peak_activations(schedule)[rank] * len(place))

    order = forward_only(axis.size, schedule.num_micro_batches, stage_to_rank=schedule.stage_to_rank)
    evaluate = PipelineExecutor(
        insert_communication(order), place, boundaries, axis=axis, device=CPU, before_run=store.plan, policy=case.policy
    )
    evaluated = evaluate.run(micro_batches, _head)
    if schedule.num_stages - 1 in place:
        assert all(map(torch.equal, results, losses)) and all(map(torch.equal, evaluated, losses))
        assert len(results) == len(evaluated) == len(losses)
        assert not any(x.requires_grad for x in (*results, *evaluated))
    else:
        assert results == evaluated == []
    return ran


def _check_order(case: Case, order: Sequence[Action], done: Mapping[int, Sequence[str]], rank: int) -> None:
    """Each action ran once, but recomputes that their backwards have overtaken, and each R computed something again."""
    program = [a for a in case.schedule.ranks[rank] if a.kind.is_compute]
    missing = Counter(program) - Counter(order)
    assert not Counter(order) - Counter(program)
    assert all(a.kind is ActionKind.RECOMPUTE and case.policy == "ready" for a in missing), missing
    names = {ActionKind.RECOMPUTE: "R", ActionKind.BACKWARD: "B", ActionKind.BACKWARD_INPUT: "B"}
    for stage, of_stage in done.items():
        own = [f"{stage}{names[a.kind]}{a.micro_batch}" for a in order if a.stage == stage and a.kind in names]
        assert list(of_stage[-len(own) :]) == own


def _check_all(world: World, shape: GridShape, cases: Sequence[Case], *, shared_memory: bool = True) -> list[bool]:
    """Whether a rank ran each case in another order than that of its program."""
    grid = make_grid(shape, world, shared_memory=shared_memory)
    changed = []
    for case in cases:
        ran = _check(case, grid)
        program = [a for a in case.schedule.ranks[grid.pipeline.index] if a.kind.is_compute]
        changed.append(ran.order != program)
        assert case.policy == "ready" or not changed[-1]
    grid.close()
    return changed


SPLIT = """
    0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2
    1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W2 1W1
"""
V_SHAPED = """
    0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
    1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
"""
LAST_STAGE_WIDE = """
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1 1F2 2F2 2B2 1B2
"""
LATE = """
    0F0 0F1 3F0 3I0 3F1 3I1 0I0 3W0 0W0 0I1 0W1 3W1
    1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 2W0 1W0 2W1 1W1
"""
MIXED = """
    0F0 0F1 0B0 0I1 0W1 0F2 0B2 0F3 0B3
    1F0 1B0 1F1 1I1 1W1 1F2 1B2 1F3 1I3 1W3
"""
OTHER_ORDER = """
    0F0 0F1 0B0 0B1
    1F1 1F0 1B0 1B1
"""


def _by_hand(text: str, name: str, stage_to_rank: tuple[int, ...] = (0, 1)) -> Schedule:
    return insert_communication(Schedule.from_text(text, name=name, stage_to_rank=stage_to_rank))


COSTS = Costs(recompute=1.0)


def _recomputing(name: str, ranks: int, micro_batches: int) -> Schedule:
    schedule = with_recompute(build_schedule(name, ranks, micro_batches), COSTS)
    assert schedule.recomputes
    return schedule


NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2", "zb_v", "v_half")


def test_schedules_on_two_ranks() -> None:
    cases = [Case(build_schedule(name, 2, m)) for name in NAMES for m in (1, 3)]
    cases += [
        Case(build_schedule("interleaved", 2, 3, virtual_stages=3)),
        Case(_by_hand(V_SHAPED, "v-shaped", (0, 1, 1, 0))),  # neighbours on one rank hand over directly
        Case(_by_hand(LAST_STAGE_WIDE, "last stage wide", (0, 1, 1))),
        Case(_by_hand(MIXED, "whole and split backwards of a stage")),
        Case(_by_hand(OTHER_ORDER, "micro-batches in another order")),
    ]
    cases = [*(Case(_recomputing(name, 2, 3)) for name in NAMES), *cases]
    cases += [Case(case.schedule, "ready", jitter=1e-3) for case in cases[:-1]]
    run_ranks(2, _check_over_both, GridShape(pipeline=2), cases)


def test_schedules_on_four_ranks() -> None:
    """By readiness ranks really run another order: weight gradients fill the time in which inputs are late."""
    cases = [Case(build_schedule(name, 4, m)) for name, m in zip(NAMES, (5, 2, 6, 5, 9, 5, 7), strict=True)]
    cases += [Case(build_schedule(name, 4, 7), "ready", jitter=6e-3) for name in NAMES]
    changed = run_ranks(4, _check_all, GridShape(pipeline=4), cases)
    anywhere = {f"{case.schedule.name} {case.policy}" for case, *on in zip(cases, *changed, strict=True) if any(on)}
    assert anywhere >= {"zb_v ready", "v_half ready"}, anywhere


def test_sharded_parameters() -> None:
    cases = []
    for policy in ("static", "ready"):
        for zero in (0, 1, 2, 3):
            for name in ("1f1b", "interleaved", "zb_v"):
                cases.append(Case(build_schedule(name, 2, 3), policy, zero, 0.0 if policy == "static" else 2e-3))
        cases.append(Case(_recomputing("1f1b", 2, 4), policy, 3))
    run_ranks(4, _check_all, GridShape(pipeline=2, data=2), cases)


def test_stages_are_reduced_in_one_order_by_data_ranks_that_choose_for_themselves() -> None:
    """In one pipeline 0I1 is late and 3W1 runs ahead of it, so the stages of rank 0 are complete in another order."""
    slow = {(0, 1, 1): 0.15, (1, 0, 0): 0.06}
    case = Case(_by_hand(LATE, "late", (0, 1, 1, 0)), "ready", slow=slow)
    assert run_ranks(4, _check_all, GridShape(pipeline=2, data=2), [case])[0] == [True]


def _check_over_both(world: World, shape: GridShape, cases: Sequence[Case]) -> list[bool]:
    """Through shared memory, and the last of them through gloo."""
    return _check_all(world, shape, cases) + _check_all(world, shape, cases[-2:], shared_memory=False)


def test_ranks_with_collectives_in_their_stages_follow_one() -> None:
    cases = [Case(build_schedule(name, 2, 5), "ready", jitter=3e-3) for name in NAMES]
    cases += [Case(_recomputing(name, 2, 5), "ready", jitter=3e-3) for name in ("1f1b", "interleaved", "zb_h1", "zb_v")]
    changed = run_ranks(4, _check_over_both, GridShape(pipeline=2, tensor=2), cases)
    assert changed[0] == changed[1] and changed[2] == changed[3] and any(map(any, changed))


def test_one_rank_needs_no_group() -> None:
    for policy in ("static", "ready"):
        _check_all(World(), GridShape(), [Case(build_schedule(name, 1, 3), policy) for name in NAMES])


def _sent(grid: Grid) -> int:
    """Bytes that a rank sends for one micro-batch."""
    module, store = _stages((grid.rank,))
    executor = PipelineExecutor(
        build_schedule("1f1b", 2, 1),
        {grid.rank: module[str(grid.rank)]},
        [(), BOUNDARY],
        axis=grid.pipeline,
        device=CPU,
    )
    store.gradients.start(1)
    before = grid.meter.bytes["send"]
    executor.run(_micro_batches(1), _head)
    return grid.meter.bytes["send"] - before


def _outputs_alive(grid: Grid, schedule: Schedule) -> tuple[int, int]:
    """(most outputs of this rank's stage alive at the start of a forward, those alive at the end).

    Rank 1 takes no second message before rank 0 has sent all that it can.
    """
    module, store = _stages((grid.rank,))
    stage = module[str(grid.rank)]
    last = SLOTS + SENDS_IN_FLIGHT + 1  # the slots and the queue are full of those between

    def before(_stage: TinyStage, m: int) -> None:
        if m == (0 if grid.rank else last):
            comm.barrier(grid.pipeline)

    stage.before = before
    executor = PipelineExecutor(schedule, {grid.rank: stage}, [(), BOUNDARY], axis=grid.pipeline, device=CPU)
    store.gradients.start(12)
    executor.run(_micro_batches(12), _head)
    return stage.most_alive, sum(not ref.expired() for ref in stage.given)


def _sent_and_alive(world: World) -> tuple[int, list[tuple[int, int]]]:
    grid = make_grid(GridShape(pipeline=2), world)
    schedules = build_schedule("gpipe", 2, 12), insert_communication(forward_only(2, 12))
    return _sent(grid), [_outputs_alive(grid, schedule) for schedule in schedules]


def test_outputs_are_sent_where_they_carry_something_and_then_freed() -> None:
    """Of twelve micro-batches, four tensors each, only those of the few messages that wait for room are alive."""
    (forward, alive), (backward, _) = run_ranks(2, _sent_and_alive)
    assert forward == 4 * (2 * BATCH * WIDTH + BATCH * SIDE) + 8 * BATCH
    assert backward == 4 * (BATCH * WIDTH + BATCH * SIDE)
    for most, in_the_end in alive:
        assert 4 * (SENDS_IN_FLIGHT - 1) <= most <= 4 * SENDS_IN_FLIGHT
        assert in_the_end == 0


class Squares(nn.Module):
    """A linear layer between two squares, which their backward reads; remembers what is made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(WIDTH, (WIDTH,), tp=no_tensor_parallel())
        self.made: list[tuple[StorageWeakRef, ...]] = []

    def forward(self, inputs: Tensors, micro_batch: Tensor) -> Tensors:
        """One tensor."""
        a = inputs[0] if inputs else micro_batch * 1
        b = a.square()
        c = self.linear(b)
        d = c.square()
        self.made.append(tuple(StorageWeakRef(x.untyped_storage()) for x in (a, b, c, d)))
        return (d,)

    def alive(self) -> list[str]:
        """What is, of each micro-batch."""
        return ["".join(n for n, ref in zip("abcd", refs, strict=True) if not ref.expired()) for refs in self.made]


def test_after_the_input_gradient_only_what_the_weight_gradient_reads_is_kept() -> None:
    schedule = Schedule.from_text("0F0 1F0 1I0 0F1 0I0 1F1 1W0 1I1 0W0 0I1 1W1 0W1", stage_to_rank=(0, 0))
    stages = {str(n): Squares() for n in range(2)}
    store = ParameterStore(
        [[(n, stage)] for n, stage in stages.items()], grid=make_grid(GridShape()), device=CPU, seed=0
    )
    axis, before = single_axis("pipeline"), {}
    executor = PipelineExecutor(
        schedule, {int(n): stage for n, stage in stages.items()}, [(), (TensorSpec((BATCH, WIDTH)),)], axis=axis,
        device=CPU, deferrer=store.gradients,
    )  # fmt: skip
    where = axis.meter.where
    now = type(where).now

    def note(self: Any, doing: Any) -> None:
        before[str(doing)] = [stage.alive() for stage in stages.values()]
        now(self, doing)

    store.gradients.start(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(where), "now", note)
        executor.run(_micro_batches(2), lambda outputs, _: outputs[0].sum())
    assert before["1I0"] == [["bcd"], ["abc"]]  # d of the first stage is a of the second
    assert before["0F1"] == [["bc"], ["b"]]  # 1I0 has run
    assert before["1F1"] == [["b", "bcd"], ["b"]]  # 0I0
    assert before["1I1"] == [["b", "bcd"], ["", "abc"]]  # 1W0
    assert before["0W1"] == [["", "b"], ["", ""]]
    assert [stage.alive() for stage in stages.values()] == [["", ""], ["", ""]]


def _end_of(world: World, shape: GridShape, policy: Policy, faulty: int) -> str:
    """How a pass ends on this rank when a stage of rank `faulty` fails."""
    grid = make_grid(shape, world, timeout=20)
    schedule = build_schedule("interleaved", 2, 6)
    module, store = _stages(schedule.stages_of(grid.pipeline.index), grid)
    place: dict[int, TinyStage] = {int(number): stage for number, stage in module.items()}  # type: ignore[misc]

    def before(_stage: TinyStage, m: int) -> None:
        if world.rank == faulty and m == 3:
            raise ZeroDivisionError("planted")

    for stage in place.values():
        stage.before, stage.meeting = before, grid.tensor
    executor = PipelineExecutor(
        schedule, place, [(), *[BOUNDARY] * 3], axis=grid.pipeline, device=CPU, deferrer=store.gradients, policy=policy,
        group=grid.tensor,
    )  # fmt: skip
    store.gradients.start(6)
    try:
        executor.run(_micro_batches(6), _head)
    except (ZeroDivisionError, PeerLostError) as error:
        return type(error).__name__
    return "nothing"


def test_a_stage_that_fails_is_an_error_there_and_a_lost_peer_elsewhere() -> None:
    found = run_ranks(4, _end_of, GridShape(pipeline=2, tensor=2), "ready", 3)
    assert found == ["PeerLostError"] * 3 + ["ZeroDivisionError"]
    assert run_ranks(2, _end_of, GridShape(pipeline=2), "static", 0) == ["ZeroDivisionError", "PeerLostError"]


def test_what_cannot_be_run() -> None:
    gathers = Schedule.from_text("0UNSHARD 0F0 0B0")
    with pytest.raises(ValueError, match=r"uses \['UNSHARD'\], which cannot be run yet"):
        PipelineExecutor(gathers, {0: TinyStage(0)}, [()], axis=single_axis("pipeline"), device=CPU)
    split = Schedule.from_text("0F0 0I0 0W0")
    module, _ = _stages((0,))
    executor = PipelineExecutor(split, {0: module["0"]}, [()], axis=single_axis("pipeline"), device=CPU)
    with pytest.raises(AssertionError, match="needs a deferrer"):
        executor.run(_micro_batches(1), _head)
    with pytest.raises(AssertionError):
        executor.run(_micro_batches(2), _head)
    with pytest.raises(ValueError, match="cannot carry a gradient"):
        TensorSpec((BATCH,), torch.int64)
    with pytest.raises(ScheduleError, match="cannot run by readiness: stages 0 and 1"):
        schedule = _by_hand(OTHER_ORDER, "other")
        axis = Axis(name="pipeline", ranks=(0, 1), index=0, planned=True)
        PipelineExecutor(schedule, {0: module["0"]}, [(), BOUNDARY], axis=axis, device=CPU, policy="ready")


def test_a_recompute_of_a_stage_that_drops_nothing_does_nothing() -> None:
    module, store = _stages((0,))
    schedule = Schedule.from_text("0F0 0R0 0B0")
    executor = PipelineExecutor(
        schedule, {0: module["0"]}, [()], axis=single_axis("pipeline"), device=CPU, deferrer=store.gradients
    )
    store.gradients.start(1)
    assert torch.equal(executor.run(_micro_batches(1), _head)[0], _gradients(1, _micro_batches(1))[0][0])
    assert module["0"].done == ["0B0"]


def test_a_pass_leaves_no_message_expected() -> None:
    module, store = _stages((0,))
    executor = PipelineExecutor(
        build_schedule("1f1b", 2, 1), {0: module["0"]}, [(), BOUNDARY], device=CPU, deferrer=store.gradients,
        axis=Axis(name="pipeline", ranks=(0, 1), index=0, planned=True),
    )  # fmt: skip
    for expected in (False, True):
        store.gradients.start(1)
        if not expected:
            executor.run(_micro_batches(1), _head)
            continue
        executor.post.start(receives=[(executor.post.lanes[Route(1, 0)], 1)])
        with pytest.raises(AssertionError, match=r"still expected: .*inputs of stage 1.: 1}"):
            executor.run(_micro_batches(1), _head)


def test_the_host_chooses_one_action_ahead_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            self.number = len([x for x in seen if x.startswith("record")])

        def record(self) -> None:
            seen.append(f"record {self.number}")

        def synchronize(self) -> None:
            seen.append(f"done {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = ready.Pace()
    for _ in range(3):
        pace.step()
    assert seen == ["record 0", "record 1", "done 0", "record 2", "done 1"]
