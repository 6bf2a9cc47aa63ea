"""The executor on 2 and 4 ranks, with small stages that pass two tensors with a gradient, and an integer and a
floating-point one without.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.comm import single_axis
from parallel.grid import Grid, GridShape, make_grid
from parallel.pipeline import Schedule, build_schedule, forward_only, insert_communication, validate
from parallel.pipeline.execution import PipelineExecutor, TensorSpec
from parallel.process_group import World
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


class TinyStage(nn.Module):
    """Mixes its inputs so that a wrong tensor, order or gradient shows; remembers the storage of what it gave."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.main = ColumnParallelLinear(WIDTH, (WIDTH,), tp=no_tensor_parallel())
        self.side = ColumnParallelLinear(WIDTH, (SIDE,), tp=no_tensor_parallel())
        self.given: list[StorageWeakRef] = []
        self.most_alive = 0

    def forward(self, inputs: Tensors, micro_batch: Tensor) -> Tensors:
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
        out = (y, count + 1, self.side(x.sin()) * side, frozen + y.detach())
        self.given += [StorageWeakRef(t.untyped_storage()) for t in out]
        return out


def _head(outputs: Tensors, micro_batch: Tensor) -> Tensor:
    y, count, side, frozen = outputs
    return (y.square().sum(1) * count).sum() + side.sum() + y.sum() * micro_batch.sum() + (y * frozen).sum()


def _micro_batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, BATCH, WIDTH, generator=torch.Generator().manual_seed(count)))


def _stages(numbers: tuple[int, ...], grid: Grid | None = None, zero: int = 0) -> tuple[nn.ModuleDict, ParameterStore]:
    """The stages with these numbers, each of one layer."""
    module = nn.ModuleDict({str(n): TinyStage(n) for n in numbers})
    policy = ShardingPolicy(stage=zero, reduce="micro_batch" if zero > 1 else "step")
    stages = [[(number, stage)] for number, stage in module.items()]
    return module, ParameterStore(stages, grid=grid or make_grid(GridShape()), device=CPU, seed=0, policy=policy)


def _one_process(num_stages: int, micro_batches: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients without any executor."""
    module, store = _stages(tuple(range(num_stages)))
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


def _check(schedule: Schedule, world: World, data: int = 1, zero: int = 0) -> None:
    """A training pass equals one process, and so does an evaluation pass over the same placement, on every rank.

    Args:
        data: data-parallel ranks, which all see the same. zero: ZeRO stage over them.
    """
    validate(schedule)
    grid = make_grid(GridShape(pipeline=world.size // data, data=data), world)
    axis, rank = grid.pipeline, grid.pipeline.index
    module, store = _stages(schedule.stages_of(rank), grid, zero)
    boundaries = [(), *[BOUNDARY] * (schedule.num_stages - 1)]
    micro_batches = _micro_batches(schedule.num_micro_batches)
    losses, expected = _one_process(schedule.num_stages, micro_batches)
    place = {int(number): stage for number, stage in module.items()}
    executor = PipelineExecutor(
        schedule, place, boundaries, axis=axis, device=CPU, deferrer=store.gradients, before_run=store.plan
    )
    products, add = [], store.gradients._add_product
    store.gradients._add_product = lambda *args: (products.append(grid.meter.where.doing.kind.name), add(*args))[1]  # type: ignore
    for _ in range(2):  # an executor is used again at each step
        store.gradients.start(schedule.num_micro_batches)
        results = executor.run(micro_batches, _head)
        store.gradients.finish()
        found = store.local_values("sums")
        assert set(found) == {name for name in expected if int(name.split(".")[0]) in place}
        for name, grad in found.items():
            torch.testing.assert_close(grad, data * expected[name], msg=lambda m, n=name: f"{schedule.name} {n}: {m}")
        assert not any(parameter.grad is not None for parameter in module.parameters())
        store.updated()
    splits = any(action.kind.name == "BACKWARD_WEIGHT" for action in schedule.ranks[rank])
    assert set(products) == {"BACKWARD_WEIGHT" if splits else "BACKWARD"}

    order = forward_only(axis.size, schedule.num_micro_batches, stage_to_rank=schedule.stage_to_rank)
    evaluate = PipelineExecutor(
        insert_communication(order), place, boundaries, axis=axis, device=CPU, before_run=store.plan
    )
    evaluated = evaluate.run(micro_batches, _head)
    if schedule.num_stages - 1 in place:
        torch.testing.assert_close(results, losses)
        torch.testing.assert_close(evaluated, losses)
        assert not any(x.requires_grad for x in (*results, *evaluated))
    else:
        assert results == evaluated == []
    grid.close()


SPLIT = """
    0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2
    1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W2 1W1
"""
INTERLEAVED = """
    0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
"""
V_SHAPED = """
    0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
    1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
"""
SPLIT_V_SHAPED = """
    0F0 0F1 3F0 3I0 3F1 3I1 3W0 0I0 3W1 0I1 0W0 0W1
    1F0 2F0 1F1 2F1 2I0 1I0 2W0 2I1 1I1 1W0 2W1 1W1
"""
LAST_STAGE_WIDE = """
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1 1F2 2F2 2B2 1B2
"""


def _by_hand(text: str, name: str, stage_to_rank: tuple[int, ...] = (0, 1)) -> Schedule:
    return insert_communication(Schedule.from_text(text, name=name, stage_to_rank=stage_to_rank))


def _two_ranks(world: World) -> None:
    for name, micro_batches in (("gpipe", 3), ("1f1b", 3), ("1f1b", 1)):
        _check(build_schedule(name, 2, micro_batches), world)
    _check(_by_hand(SPLIT, "split"), world)
    _check(_by_hand(INTERLEAVED, "interleaved", (0, 1, 0, 1)), world)
    _check(_by_hand(V_SHAPED, "v-shaped", (0, 1, 1, 0)), world)  # neighbours on one rank hand over directly
    _check(_by_hand(SPLIT_V_SHAPED, "split v-shaped", (0, 1, 1, 0)), world)
    _check(_by_hand(LAST_STAGE_WIDE, "last stage wide", (0, 1, 1)), world)


def test_schedules_on_two_ranks() -> None:
    run_ranks(2, _two_ranks)


def _four_ranks(world: World) -> None:
    for name, micro_batches in (("gpipe", 5), ("1f1b", 5), ("1f1b", 2)):
        _check(build_schedule(name, 4, micro_batches), world)


def test_schedules_on_four_ranks() -> None:
    run_ranks(4, _four_ranks)


def _two_by_two_ranks(world: World) -> None:
    for zero in (1, 2, 3):
        _check(build_schedule("1f1b", 2, 3), world, data=2, zero=zero)
        _check(_by_hand(INTERLEAVED, "interleaved", (0, 1, 0, 1)), world, data=2, zero=zero)
        _check(_by_hand(SPLIT_V_SHAPED, "split v-shaped", (0, 1, 1, 0)), world, data=2, zero=zero)


def test_schedules_with_sharded_parameters() -> None:
    run_ranks(4, _two_by_two_ranks)


def test_one_rank_needs_no_group() -> None:
    _check(build_schedule("1f1b", 1, 3), World())


def _sent(world: World) -> int:
    """Bytes that a rank sends for one micro-batch."""
    grid = make_grid(GridShape(pipeline=2), world)
    module, store = _stages((world.rank,))
    schedule = build_schedule("1f1b", 2, 1)
    executor = PipelineExecutor(
        schedule, {world.rank: module[str(world.rank)]}, [(), BOUNDARY], axis=grid.pipeline, device=CPU
    )
    store.gradients.start(1)
    executor.run(_micro_batches(1), _head)
    sent = grid.meter.bytes["send"]
    grid.close()
    return sent


def test_nothing_is_sent_for_what_carries_no_gradient() -> None:
    forward, backward = run_ranks(2, _sent)
    assert forward == 4 * (2 * BATCH * WIDTH + BATCH * SIDE) + 8 * BATCH
    assert backward == 4 * (BATCH * WIDTH + BATCH * SIDE)
    with pytest.raises(ValueError, match="cannot carry a gradient"):
        TensorSpec((BATCH,), torch.int64)


def _outputs_alive(world: World, forwards_only: bool) -> tuple[int, int]:
    """(most outputs of this rank's stage alive at the start of a forward, those alive at the end)."""
    micro_batches = _micro_batches(12)
    schedule = insert_communication(forward_only(2, 12)) if forwards_only else build_schedule("gpipe", 2, 12)
    axis = make_grid(GridShape(pipeline=2), world).pipeline
    module, store = _stages((world.rank,))
    stage = module[str(world.rank)]
    executor = PipelineExecutor(schedule, {world.rank: stage}, [(), BOUNDARY], axis=axis, device=CPU)
    store.gradients.start(12)
    executor.run(micro_batches, _head)
    return stage.most_alive, sum(not ref.expired() for ref in stage.given)


def _outputs_alive_both(world: World) -> list[tuple[int, int]]:
    return [_outputs_alive(world, forwards_only) for forwards_only in (False, True)]


def test_outputs_are_freed_after_sending() -> None:
    """Of twelve micro-batches, four tensors each, only those of the few messages under way are alive."""
    for most, in_the_end in run_ranks(2, _outputs_alive_both)[0]:
        assert most <= 4 * 4
        assert in_the_end == 0


def test_what_cannot_be_run() -> None:
    recompute = Schedule.from_text("0F0 0R0 0B0")
    with pytest.raises(ValueError, match=r"uses \['RECOMPUTE'\], which cannot be run yet"):
        PipelineExecutor(recompute, {0: TinyStage(0)}, [()], axis=single_axis("pipeline"), device=CPU)
    split = Schedule.from_text("0F0 0I0 0W0")
    module, _ = _stages((0,))
    executor = PipelineExecutor(split, {0: module["0"]}, [()], axis=single_axis("pipeline"), device=CPU)
    with pytest.raises(AssertionError, match="needs a deferrer"):
        executor.run(_micro_batches(1), _head)
    with pytest.raises(AssertionError):
        executor.run(_micro_batches(2), _head)
