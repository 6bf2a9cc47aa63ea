"""ZeRO stage 3: the fewest gathers that a number of buffers allows, each started in time, and the right weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.grid import Grid, GridShape, make_grid
from parallel.pipeline import Schedule, build_schedule, forward_only
from parallel.process_group import World
from parallel.sharding import ParameterStore
from parallel.sharding.gather import Gatherer
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel
from tests.distributed import run_ranks
from tests.parallel.sharding.modules import (
    CPU,
    FakeWire,
    Holder,
    NamedLayers,
    fake_wire,
    make_store,
    parameter,
    planned,
    policy_of,
)

SIZE = 32  # elements of each unit of `_holders`, on both ranks
BYTES = 4 * SIZE


class Watched:
    """A store of units with one parameter each, `buffers` buffers, and what happens on its wire."""

    def __init__(self, wire: FakeWire, units: int, buffers: int) -> None:
        self.wire = wire
        self.layers: NamedLayers = [(f"u{i}", Holder(w=parameter(SIZE))) for i in range(units)]
        self.store = make_store(self.layers, policy_of(3, gather=buffers * BYTES), grid=planned(data=2))
        self.gatherer = self.store.gatherer
        self._unit_at = {bucket.weights.data_ptr(): unit.index for unit in self.store.units for bucket in unit.buckets}

    @property
    def gathered(self) -> list[int]:
        """Units whose gathers were started, in order."""
        return [self._unit_at[place] for place in self.wire.gathered]

    @property
    def arrived(self) -> list[int]:
        """Units whose gathers were waited for, in order."""
        return [self._unit_at[place] for place in self.wire.waited]

    def use(self, index: int) -> None:
        """As hooks do; the weights must be there."""
        self.gatherer.use(index)
        bucket = self.store.units[index].buckets[0]
        weight = self.layers[index][1].w
        assert torch.equal(weight, bucket.weights.repeat(2))
        assert weight.data_ptr() in [buffer.memory.data_ptr() for buffer in self.gatherer.buffers]


@contextmanager
def _watched(units: int, buffers: int) -> Iterator[Watched]:
    with fake_wire() as wire:
        yield Watched(wire, units, buffers)


# -- the fewest gathers ------------------------------------------------------------------------------------------------


def _fewest_gathers(uses: Sequence[int], buffers: int) -> int:
    """By trying everything: while a unit is used, it and the next one are in buffers."""
    states = {frozenset[int](): 0}
    for first, following in pairwise((uses[0], *uses, uses[-1])):
        found: dict[frozenset[int], int] = {}
        for held, cost in states.items():
            if following in held:
                options = [(held, cost)]
            elif len(held) < buffers:
                options = [(held | {following}, cost + 1)]
            else:
                options = [(held - {out} | {following}, cost + 1) for out in held if out != first]
            for state, total in options:
                found[state] = min(total, found.get(state, total))
        states = found
    return min(states.values())


def test_the_brute_force_is_right() -> None:
    assert _fewest_gathers([0, 1, 2, 2, 1, 0], 2) == 4  # 1 and 2 stay
    assert _fewest_gathers([0, 1, 2, 3, 3, 2, 1, 0], 2) == 6
    assert _fewest_gathers([0, 1, 2, 3, 3, 2, 1, 0], 3) == 5
    assert _fewest_gathers([0, 1, 2, 0, 1, 2], 2) == 6  # one of two is always in use
    assert _fewest_gathers([0, 1, 2, 0, 1, 2], 3) == 3
    assert _fewest_gathers([4, 4, 4], 2) == 1


@pytest.mark.parametrize("buffers", [2, 3, 4])
def test_evictions_are_those_that_cost_least(buffers: int) -> None:
    """Belady's rule, under the condition that the unit in use cannot be given up for the next."""
    draw = random.Random(buffers)
    worse = 0
    for _ in range(100):
        units = draw.randint(buffers + 1, 6)
        uses = [draw.randrange(units) for _ in range(draw.randint(1, 25))]
        with _watched(units, buffers) as w:
            assert len(w.gatherer.buffers) == buffers
            w.gatherer.plan(uses)
            for use in uses:
                w.use(use)
            assert len(w.gathered) == len(w.arrived) == _fewest_gathers(uses, buffers), uses
            worse += len(w.gathered) > len(set(uses))
    assert worse > 20  # there was something to decide


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_a_pass_over_a_schedule(name: str) -> None:
    """Forward through all units and back, for each micro-batch: the unit at each turn stays, and so do others."""
    with _watched(5, 2) as w:
        actions = build_schedule(name, 1, 3).ranks[0]
        w.store.plan(actions, [0])
        uses = []
        for action in actions:
            uses += range(5) if action.kind.name == "FORWARD" else reversed(range(5))
        for use in uses:
            w.use(use)
        assert len(w.gathered) == _fewest_gathers(uses, 2)
        if name == "1f1b":  # two stay at the turn from forward to backward, two from there to the next forward
            assert len(w.gathered) == 5 + 3 * 3 + 2 * 3


def test_units_of_several_stages_on_a_rank() -> None:
    """Stages are known by their order: here the rank holds stages 1 and 3 of four, of two units each."""
    layers: list[NamedLayers] = [[(f"s{s}u{i}", Holder(w=parameter(SIZE))) for i in range(2)] for s in (1, 3)]
    with fake_wire() as wire:
        store = ParameterStore(layers, grid=planned(data=2), device=CPU, seed=0, policy=policy_of(3))
        schedule = Schedule.from_text("0F0 2F0 2B0 0B0\n1F0 3F0 3I0 3W0 1B0", stage_to_rank=(0, 1, 0, 1))
        store.plan(schedule.ranks[1], [1, 3])
        for index in (0, 1, 2, 3, 3, 2, 1, 0):
            store.gatherer.use(index)
        assert len(wire.gathered) == len(wire.waited) == 6


def test_nothing_is_gathered_for_a_backward_that_does_not_come() -> None:
    layers: list[NamedLayers] = [[(name, Holder(w=parameter(SIZE))) for name in "abcd"]]
    with fake_wire() as wire:
        store = ParameterStore(
            layers, grid=planned(data=2), device=CPU, seed=0, policy=policy_of(3), forward_only={"a", "c"}
        )
        store.plan(build_schedule("1f1b", 1, 1).ranks[0], [0])
        for index in (0, 1, 2, 3, 3, 1):
            store.gatherer.use(index)
        assert len(wire.gathered) == len(wire.waited) == 5


# -- in time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [2, 3, 9])
def test_the_next_unit_is_on_its_way_while_this_one_computes(buffers: int) -> None:
    with _watched(4, buffers) as w:
        uses = [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
        w.gatherer.plan(uses)
        for place, use in enumerate(uses):
            if place:
                assert use in w.gatherer._at  # started before it was asked for
            w.use(use)
            held = {buffer.holds.index: bool(buffer.arriving) for buffer in w.gatherer.buffers if buffer.holds}
            assert held[use] is False
            later = [unit for unit in uses[place + 1 :] if unit != use][:1]
            assert set(later) <= set(held)
            assert all(unit in later for unit, arriving in held.items() if arriving)  # one ahead, not more
        assert not any(buffer.arriving for buffer in w.gatherer.buffers)


def test_an_unplanned_use_still_works() -> None:
    with _watched(4, 2) as w:
        for use in (2, 0, 3, 3, 1, 2):  # nothing planned: fetched when needed
            w.use(use)
        assert w.gathered == w.arrived == [2, 0, 3, 1, 2]
    with _watched(4, 2) as w:
        w.gatherer.plan([0, 1, 2, 3, 2, 1, 0])
        for use in (0, 3, 1, 0, 2, 3, 0, 0, 2, 1, 0, 3):  # others between, and again
            w.use(use)
    with _watched(4, 2) as w:
        w.gatherer.plan([0, 1])
        w.use(0)
        w.gatherer.plan([3, 2])  # what was on its way (1) is not wanted any more
        for use in (3, 2, 1, 0):
            w.use(use)


def test_using_a_unit_again_does_not_lose_the_plan() -> None:
    """A layer that is recomputed in backward is used twice in a row there; gathers are as if it were once."""
    uses = [0, 1, 2, 3, 3, 2, 1, 0] * 3
    counts = []
    for again in (1, 2, 3):
        with _watched(4, 2) as w:
            w.gatherer.plan(uses)
            for place, use in enumerate(uses):
                for _ in range(again if place % 8 > 3 else 1):
                    w.use(use)
                assert place + 1 == len(uses) or uses[place + 1] in w.gatherer._at
            counts.append(len(w.gathered))
    assert counts == [_fewest_gathers(uses, 2)] * 3


# -- kept or forgotten -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [4, 5, float("inf")])
def test_weights_are_kept_between_micro_batches_but_not_across_an_update(buffers: float) -> None:
    with fake_wire() as wire:
        w = Watched(wire, 4, buffers)  # type: ignore[arg-type]
        assert w.gatherer.keeps_all
        for step in (1, 2):
            w.gatherer.plan([0, 1, 2, 3, 3, 2, 1, 0] * 3)
            for use in [0, 1, 2, 3, 3, 2, 1, 0] * 3:
                w.use(use)
            assert w.gathered == [0, 1, 2, 3] * step
            for bucket in w.store.buckets:
                bucket.weights.add_(1)
            w.store.updated()


def test_an_update_takes_in_what_was_fetched_for_nothing() -> None:
    """Planned uses that do not come: layers before the first that is trained have no backward."""
    for buffers in (2, 9):
        with _watched(4, buffers) as w:
            for _ in range(2):
                w.gatherer.plan([0, 1, 2, 3, 3, 2, 1, 0] * 2)
                for use in [0, 1, 2, 3, 3, 2] * 2:
                    w.use(use)
                w.store.updated()
                assert len(w.gathered) == len(w.arrived)


def test_buffers_and_their_bytes() -> None:
    sizes = [100, 32, 1000, 900, 900]  # elements
    padded = [128, 32, 1024, 928, 928]  # over 2 ranks

    def lengths(gather: float, dtype: torch.dtype = torch.float32) -> list[int]:
        layers: NamedLayers = [(f"u{i}", Holder(w=parameter(size))) for i, size in enumerate(sizes)]
        store = make_store(layers, policy_of(3, gather=gather), grid=planned(data=2), dtype=dtype)
        found = [buffer.memory.nbytes for buffer in store.gatherer.buffers]
        assert store.memory()["gather buffers"] == sum(found)
        return found

    everything = 4 * sum(padded)
    assert lengths(0) == lengths(4 * 1024 * 2.9) == lengths(everything - 1) == [4 * 1024] * 2
    assert lengths(everything) == lengths(1e12) == lengths(float("inf")) == [4 * size for size in padded]
    assert lengths(0, torch.bfloat16) == [2 * 1024] * 2
    assert lengths(everything / 2, torch.bfloat16) == [2 * size for size in padded]
    with _watched(9, 3) as w:
        assert [buffer.memory.nbytes for buffer in w.gatherer.buffers] == [BYTES] * 3 and not w.gatherer.keeps_all
    with _watched(2, 0) as w:  # two are made in any case
        assert [buffer.memory.nbytes for buffer in w.gatherer.buffers] == [BYTES] * 2 and w.gatherer.keeps_all


@pytest.mark.parametrize("buffers", [2, 3, 4, 5])
def test_tensor_ranks_whose_heads_differ_in_number_have_as_many_buffers(buffers: int) -> None:
    """Their gathers of what is partial must come in one order; and each keeps to the budget."""

    def gatherer(rank: int, budget: float) -> Gatherer:
        grid = planned(rank, data=2, tensor=2)
        layers: NamedLayers = [
            (f"u{i}", Holder(heads=parameter(800, tensor=grid.tensor, unit=160), norm=parameter(9, partial=True)))
            for i in range(5)
        ]
        return make_store(layers, policy_of(3, gather=budget), grid=grid).gatherer

    more, less = (gatherer(rank, 0).buffers[0].memory.nbytes for rank in (0, 1))
    budget = more * (buffers + 1) - 1
    assert budget // less > buffers  # what the second would make by its own sizes
    found = [gatherer(rank, budget) for rank in (0, 1)]
    assert [len(g.buffers) for g in found] == [buffers] * 2
    assert [g.keeps_all for g in found] == [buffers == 5] * 2
    assert all(sum(buffer.memory.nbytes for buffer in g.buffers) <= budget for g in found)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_nothing_is_gathered(stage: int) -> None:
    with fake_wire() as wire:
        store = make_store([("a", Holder(w=parameter(SIZE)))], policy_of(stage), grid=planned(data=2))
        store.gatherer.plan([0])
        store.gatherer.use(0)
        assert not wire.gathered and not store.gatherer.buffers
    alone = make_store([("a", Holder(w=parameter(SIZE)))], policy_of(3))  # nor on one rank
    assert not alone.gatherer.buffers


def test_no_unit_at_all() -> None:
    store = make_store([("a", nn.Identity())], policy_of(3, gather=float("inf")), grid=planned(data=2))
    assert store.gatherer.buffers == [] and store.memory()["gather buffers"] == 0


# -- right weights -----------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A product through the sink, a scale and a shift through autograd; of a width of its own inside."""

    def __init__(self, inner: int, frozen: bool) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(4, (inner,), tp=no_tensor_parallel())
        self.scale = parameter(inner, frozen=frozen)
        self.down = ColumnParallelLinear(inner, (4,), tp=no_tensor_parallel())
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(self._inner, x, use_reentrant=False) if self.recompute else self._inner(x)
        return x + self.down(inner)

    def _inner(self, x: Tensor) -> Tensor:
        return (self.up(x) * self.scale).tanh()


def _layers() -> NamedLayers:
    return [(f"l{i}", Affine(3 + 5 * i, frozen=i == 2)) for i in range(5)]


Forward = Callable[[NamedLayers, Tensor], Tensor]


def _plainly(layers: NamedLayers, x: Tensor) -> Tensor:
    for _, layer in layers:
        x = layer(x)
    return x


def _layers_recomputed(layers: NamedLayers, x: Tensor) -> Tensor:
    for _, layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def _parts_recomputed(layers: NamedLayers, x: Tensor) -> Tensor:
    for _, layer in layers:
        layer.recompute = True
    return _plainly(layers, x)


def _mixed(layers: NamedLayers, x: Tensor) -> Tensor:
    for i, (_, layer) in enumerate(layers):
        x = checkpoint(layer, x, use_reentrant=False) if i % 2 else layer(x)
    return x


def _region_recomputed(layers: NamedLayers, x: Tensor) -> Tensor:
    """One region over three units, more than there may be buffers."""
    x = _plainly(layers[:1], x)
    x = checkpoint(lambda y: _plainly(layers[1:4], y), x, use_reentrant=False)
    return _plainly(layers[4:], x)


WAYS: list[Forward] = [_plainly, _layers_recomputed, _parts_recomputed, _mixed]


def _train(grid: Grid, forward: Forward, stage: int, *, gather: float = 0, unit_bytes: int = 0) -> tuple[list, int]:
    """[outputs, gradients, evaluation, ...] of two steps of two micro-batches and an update, and how many gathers."""
    layers = _layers()
    policy = policy_of(stage, reduce="micro_batch", gather=gather, unit_bytes=unit_bytes)
    store = make_store(layers, policy, grid=grid)
    found: list[dict[str, Tensor] | Tensor] = []
    generator = torch.Generator().manual_seed(grid.rank)
    schedule = build_schedule("1f1b", 1, 2)
    grid.meter.reset()
    gathers = 0
    for _ in range(2):
        store.gradients.start(2)
        store.plan(schedule.ranks[0], [0])
        for _ in range(2):
            out = forward(layers, torch.randn(3, 4, generator=generator))
            found.append(out.detach().clone())
            (out**2).sum().backward()
        store.gatherer.finish()
        gathers += grid.meter.calls["all_gather"]
        store.gradients.finish()
        found.append({name: value.clone() for name, value in store.local_values("sums").items()})
        for span in store.fragments().spans:
            span.weight.sub_(span.grad, alpha=0.01)
        store.updated()
        with torch.no_grad():  # twice, so that buffers hold what the pass before left
            store.plan(forward_only(1, 2).ranks[0], [0])
            found += [forward(layers, torch.ones(2, 4)) for _ in range(2)]
        grid.meter.reset()
    found.append(store.local_values())
    return found, gathers


def _compare(world: World) -> None:
    grid = make_grid(GridShape(data=2), world)
    largest = 4 * 320
    for unit_bytes, gathers in ((0, (0, 3 * largest, 1e9)), (700, (0,))):
        expected, _ = _train(grid, _plainly, 0, unit_bytes=unit_bytes)
        for gather in gathers:
            counts = set()
            for forward in WAYS:
                found, count = _train(grid, forward, 3, gather=gather, unit_bytes=unit_bytes)
                torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda m, f=forward: f"{f}: {m}")
                counts.add(count)
            assert len(counts) == 1, (gather, counts)  # recomputing needs no further gather
            found, _ = _train(grid, _region_recomputed, 3, gather=gather, unit_bytes=unit_bytes)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_are_right_forward_backward_and_recomputed() -> None:
    run_ranks(2, _compare)
