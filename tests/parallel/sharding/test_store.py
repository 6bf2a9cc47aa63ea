"""A store's values, its two views of what is trained, and its bytes, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.optimizers import AdamW, Constants, GroupOptions
from model import Build, LayerSpec, ModelConfig, Stage, build_layers
from model.kernels import Kernels
from parallel.comm import Axis
from parallel.grid import Grid, GridShape, make_grid
from parallel.layout import TensorLayout
from parallel.process_group import World
from parallel.random import fill, key
from parallel.sharding import Fragment, Group, Holding, ParameterStore
from parallel.tensor import TensorParallel
from tests.distributed import run_ranks
from tests.parallel.sharding.modules import CPU, Holder, NamedLayers, make_store, parameter, planned, policy_of

META = torch.device("meta")
SEED = 3
STAGES = [0, 1, 2, 3]
LAYOUTS = [{}, {"data": 2}, {"tensor": 2}, {"data": 2, "tensor": 2}, {"data": 3, "context": 2}]
LAYOUTS += [{"data": 2, "tensor": 4}, {"data": 3, "tensor": 2}]
Where = dict[str, int]


def _size(where: Where) -> int:
    return GridShape(**where).world_size


def _layers(tensor: Axis) -> NamedLayers:
    """Parameters of all sorts, with sizes that do not divide; the first and the last layer share one."""
    shared = parameter(9, decay="body")
    return [
        ("embed", Holder(weight=parameter(5, 7, decay="body"), position=parameter(3, 4, partial=True), shared=shared)),
        (
            "block",
            Holder(
                heads=parameter(5 * 4, 3, tensor=tensor, unit=4, decay="body"),
                bias=parameter(5 * 4, tensor=tensor, unit=4),
                norm=parameter(11, partial=True),
                scale=parameter(),
                out_bias=parameter(6),
                mix=parameter(3, 3, decay="body"),
            ),
        ),
        ("head", Holder(weight=parameter(9, 13, tensor=tensor, decay="head"), shared=shared)),
    ]


def _dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.startswith("block.") and "norm" not in name else torch.float32


def _store(stage: int, grid: Grid, **options) -> ParameterStore:
    options = {"dtype": _dtype_of, "seed": SEED} | options
    return make_store(_layers(grid.tensor), policy_of(stage), grid=grid, **options)


@cache
def _stores(stage: int, *sizes: tuple[str, int]) -> list[ParameterStore]:
    """As each rank would make it."""
    where = dict(sizes)
    return [_store(stage, planned(rank, **where)) for rank in range(_size(where))]


def _all_stores() -> Iterator[tuple[int, Where, list[ParameterStore]]]:
    for where in LAYOUTS:
        for stage in STAGES:
            yield stage, where, _stores(stage, *where.items())


def _initial(name: str, layout: TensorLayout, store: ParameterStore) -> Tensor:
    """This tensor rank's part of a parameter, from its definition."""
    slot = next(slot for slot in store.slots if slot.name == name)
    whole = torch.empty(layout.shape)
    fill(whole, TensorLayout(shape=layout.shape), slot.member.info.init, key(SEED, name))
    return layout.local(whole)


# -- values ------------------------------------------------------------------------------------------------------------


def test_initial_values_are_those_of_the_logical_tensors() -> None:
    for stage, where, stores in _all_stores():
        for rank, store in enumerate(stores):
            for fragment in store.fragments().fragments:
                expected = _initial(fragment.name, fragment.info.layout, store).flatten()
                expected = expected[fragment.start : fragment.stop]
                assert torch.equal(fragment.weight, expected), (stage, where, rank, fragment.name)
                if fragment.model_weight is not None:
                    assert torch.equal(fragment.model_weight, expected.bfloat16())
            for slot in store.slots:
                expected = _initial(slot.name, slot.member.info.layout, store)
                assert slot.parameter.dtype == _dtype_of(slot.name)
                if stage < 3 or store.axis.size == 1 or (not slot.member.kind.partial and _shared_by(where) == 1):
                    assert torch.equal(slot.parameter, expected.to(slot.parameter.dtype)), (stage, where, slot.name)
                else:  # not there until they are gathered
                    assert slot.parameter.numel() == 0


def _shared_by(where: Where) -> int:
    """Ranks that hold copies of what is not partial."""
    return where.get("data", 1) * where.get("context", 1)


def test_modules_hold_the_slots_parameters() -> None:
    for stage in STAGES:
        grid = planned(data=2)
        layers = _layers(grid.tensor)
        store = make_store(layers, policy_of(stage), grid=grid)
        held = {f"{layer}.{name}": p for layer, module in layers for name, p in module.named_parameters()}
        names = {name for slot in store.slots for name in slot.member.names}
        assert set(held) == names and "head.shared" in names
        for slot in store.slots:
            assert all(held[name] is slot.parameter for name in slot.member.names)
            assert slot.parameter.is_leaf and slot.parameter.requires_grad


# -- fragments and spans -----------------------------------------------------------------------------------------------


def _own(fragment: Fragment) -> tuple[int, int]:
    """As a range of the parameter's local elements."""
    start, stop, _ = fragment.own.indices(fragment.stop - fragment.start)
    return fragment.start + start, fragment.start + max(start, stop)


def _logical_indices(layout: TensorLayout, start: int, stop: int) -> Tensor:
    numel = torch.Size(layout.shape).numel()
    return layout.local(torch.arange(numel).view(layout.shape)).flatten()[start:stop]


def test_own_covers_each_logical_element_once() -> None:
    for stage, where, stores in _all_stores():
        counts: dict[str, Tensor] = {}
        for store in stores:
            for fragment in store.fragments().fragments:
                layout = fragment.info.layout
                count = counts.setdefault(fragment.name, torch.zeros(torch.Size(layout.shape).numel(), dtype=torch.int))
                count[_logical_indices(layout, *_own(fragment))] += 1
        assert len(counts) == 10
        for name, count in counts.items():
            assert (count == 1).all(), (stage, where, name)


def test_own_does_not_depend_on_the_stage() -> None:
    """So that what is summed over a tensor is summed in one order at every stage."""
    for where in LAYOUTS:
        found = [
            [{f.name: _own(f) for f in store.fragments().fragments if _own(f)[0] < _own(f)[1]} for store in stores]
            for stores in (_stores(stage, *where.items()) for stage in STAGES)
        ]
        assert all(other == found[0] for other in found)


def test_what_is_trained() -> None:
    """Stage 0: everything on every rank; else a rank's shard: what tensor ranks hold copies of is cut on each alike."""
    for stage, where, stores in _all_stores():
        tensor, copies = where.get("tensor", 1), _shared_by(where)
        trained: dict[str, Tensor] = {}
        for store in stores:
            for fragment in store.fragments().fragments:
                layout = fragment.info.layout
                local = torch.Size(layout.local_shape).numel()
                assert 0 <= fragment.start <= fragment.stop <= local
                assert fragment.weight.shape == fragment.grad.shape == (fragment.stop - fragment.start,)
                replicas = copies * (tensor if fragment.info.partial_over_tensor else 1)
                if stage == 0 or replicas == 1:
                    assert (fragment.start, fragment.stop) == (0, local)
                else:
                    own = _own(fragment)
                    assert own == (fragment.start, fragment.stop) or own[0] == own[1]
                numel = torch.Size(layout.shape).numel()
                count = trained.setdefault(fragment.name, torch.zeros(numel, dtype=torch.int))
                count[_logical_indices(layout, fragment.start, fragment.stop)] += 1
        for name, count in trained.items():
            split = name in ("block.heads", "block.bias", "head.weight")
            partial = name in ("embed.position", "block.norm")
            times = 1 if split or (partial and stage) else tensor
            times *= copies if stage == 0 else 1
            assert (count == times).all(), (stage, where, name)


def _pieces(holdings: list[Holding], rank: int) -> list[tuple[TensorLayout, int, int]]:
    return [(h.layout, h.start, h.stop) for h in holdings if h.rank == rank]


def test_holdings_say_what_every_rank_has() -> None:
    for stage, where, stores in _all_stores():
        names = [fragment.name for fragment in stores[0].fragments().fragments]
        ranks = _size(where)
        everywhere = [store.fragments() for store in stores]
        for here in everywhere:
            assert here.axis.size == ranks
            assert [fragment.name for fragment in here.fragments] == names  # everywhere, in one order
            assert list(here.owned) == list(here.trained) == names
            for rank, there in enumerate(everywhere):
                for fragment in there.fragments:
                    layout, where_from = fragment.info.layout, (fragment.start, fragment.stop)
                    own = [(layout, *_own(fragment))] if _own(fragment)[0] < _own(fragment)[1] else []
                    trained = [(layout, *where_from)] if fragment.start < fragment.stop else []
                    assert _pieces(here.owned[fragment.name], rank) == own, (stage, where, fragment.name)
                    assert _pieces(here.trained[fragment.name], rank) == trained, (stage, where, fragment.name)


def _bytes_of(flat: Tensor) -> range:
    return range(flat.data_ptr(), flat.data_ptr() + flat.nbytes)


def test_spans_and_fragments_are_views_of_the_same_memory() -> None:
    for stage, where, stores in _all_stores():
        for store in stores:
            fragments = store.fragments()
            spans = sorted((span for span in fragments.spans), key=lambda span: span.weight.data_ptr())
            for fragment in fragments.fragments:
                if fragment.start == fragment.stop:
                    continue
                inside = [s for s in spans if fragment.weight.data_ptr() in _bytes_of(s.weight)]
                (span,) = inside
                place = (fragment.weight.data_ptr() - span.weight.data_ptr()) // 4
                part = slice(place, place + fragment.weight.numel())
                assert span.group == fragment.group == Group(fragment.info.decay)
                assert span.weight[part].data_ptr() == fragment.weight.data_ptr()
                assert span.weight[part].shape == fragment.weight.shape
                assert span.grad[part].data_ptr() == fragment.grad.data_ptr()
                assert (span.model_weight is None) == (fragment.model_weight is None)
                if span.model_weight is not None and fragment.model_weight is not None:
                    assert span.model_weight[part].data_ptr() == fragment.model_weight.data_ptr()
            for before, after in pairwise(spans):
                assert _bytes_of(before.weight).stop <= _bytes_of(after.weight).start
            elements = sum(f.stop - f.start for f in fragments.fragments)
            spare = sum(span.weight.numel() for span in spans) - elements
            assert 0 <= spare < 16 * len(fragments.fragments), (stage, where)  # gaps of alignment only
            assert all(span.weight.data_ptr() % 16 == 0 for span in spans)  # what kernels want


def test_groups_with_depth_have_spans_of_their_own() -> None:
    grid = planned()
    depths = {"embed": 0, "block": 1, "head": 2}
    store = ParameterStore(
        [_layers(grid.tensor)], grid=grid, device=CPU, seed=0,
        policy=policy_of(0, unit_bytes=1 << 20),
        group_of=lambda name, info: Group(info.decay, depths[name.split(".")[0]]),
    )  # fmt: skip
    groups = [span.group for span in store.fragments().spans]
    expected = [("body", 0), ("body", 1), ("head", 2), ("none", 0), ("none", 1)]
    assert sorted(groups) == sorted(Group(*group) for group in expected)
    assert len(groups) == len(set(groups))  # neighbours in one array


# -- on real ranks -----------------------------------------------------------------------------------------------------


def _train_by_hand(world: World, where: Where) -> None:
    """Every rank writes what it trains; then all ranks compute with the whole of it."""
    grid = make_grid(GridShape(**where), world)
    for stage in STAGES:
        for dtype in (torch.float32, torch.bfloat16, _dtype_of):
            store = _store(stage, grid, dtype=dtype)
            before = store.local_values()
            expected = {}
            for slot in store.slots:
                layout = slot.member.info.layout
                value = _initial(slot.name, layout, store)
                assert before[slot.name].dtype == torch.float32
                assert torch.equal(before[slot.name], value), (stage, slot.name)
                expected[slot.name] = 2 * value + 1
            for fragment in store.fragments().fragments:
                fragment.weight.copy_(expected[fragment.name].flatten()[fragment.start : fragment.stop])
            if stage % 2:
                store.round_weights()
            for span in store.fragments().spans:
                if span.model_weight is not None and not stage % 2:
                    span.model_weight.copy_(span.weight)
            for turn in range(2):
                store.updated()
                for unit in store.units:
                    store.gatherer.use(unit.index)
                    for slot in unit.slots:
                        assert torch.equal(slot.parameter, expected[slot.name].to(slot.parameter.dtype)), (
                            stage, dtype, turn, slot.name,
                        )  # fmt: skip
            after = store.local_values()
            assert all(torch.equal(after[name], value) for name, value in expected.items())
    grid.close()


def _on_ranks(world: World, layouts: list[Where]) -> None:
    for where in layouts:
        _train_by_hand(world, where)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_put_together_and_given_out(ranks: int) -> None:
    layouts = [where for where in LAYOUTS if _size(where) == ranks]
    if ranks == 4:
        layouts.append({"tensor": 4})
    if ranks == 1:
        _on_ranks(World(), layouts)
    else:
        run_ranks(ranks, _on_ranks, layouts)


def _frozen_values(world: World) -> None:
    grid = make_grid(GridShape(data=2), world)
    for stage in STAGES:
        layers: NamedLayers = [("a", Holder(w=parameter(40), frozen=parameter(50, frozen=True)))]
        store = make_store(layers, policy_of(stage), grid=grid, seed=SEED, dtype=torch.bfloat16)
        values = {name: _initial(name, TensorLayout(shape=(n,)), store) for name, n in (("a.w", 40), ("a.frozen", 50))}
        store.updated()
        store.gatherer.use(0)
        for name, value in values.items():
            assert torch.equal(layers[0][1].get_parameter(name[2:]), value.bfloat16()), (stage, name)
        found = store.local_values()
        assert torch.equal(found["a.w"], values["a.w"])
        assert torch.equal(found["a.frozen"].float(), values["a.frozen"].bfloat16().float())
        assert set(store.local_values("sums")) == {"a.w"}


def test_frozen_values() -> None:
    run_ranks(2, _frozen_values)


# -- bytes -------------------------------------------------------------------------------------------------------------

# (weights, gradients) -> by stage, bytes per parameter: what every rank has, and what d ranks share, with AdamW
BYTES = {
    (torch.float32, torch.float32): [(16, 0), (8, 8), (4, 12), (0, 16)],
    (torch.bfloat16, torch.float32): [(18, 0), (6, 12), (2, 16), (0, 18)],
    (torch.bfloat16, None): [(20, 0), (4, 16), (2, 16), (0, 18)],
}


MODELS = {
    "vit_b16": ModelConfig(preset="vit_b16").resolve(),
    "small": ModelConfig(preset="vit_ti16", width=60, num_heads=5, depth=4, mlp_dim=100, num_classes=37).resolve(),
}


@cache
def _specs(model: str) -> tuple[LayerSpec, ...]:
    return tuple(build_layers(MODELS[model]))


def _model_store(
    model: str, stage: int, grid: Grid, device: torch.device = META, *, weights: torch.dtype = torch.float32, **options
) -> ParameterStore:
    tp = TensorParallel(axis=grid.tensor)
    module = Stage(_specs(model), Build(config=MODELS[model], tp=tp))
    policy = policy_of(stage, **({"unit_bytes": 4 << 20} | options))
    return make_store(module.layers, policy, grid=grid, device=device, dtype=weights)


def _adamw_bytes(store: ParameterStore) -> int:
    groups = {fragment.group: GroupOptions() for fragment in store.fragments().fragments}
    optimizer = AdamW(store.fragments(), groups, Constants(), Kernels())
    return sum(t.nbytes for tensors in optimizer.state_tensors().values() for t in tensors)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("weights", "gradients"), list(BYTES), ids=str)
def test_bytes_per_parameter(weights: torch.dtype, gradients: torch.dtype | None, stage: int, ranks: int) -> None:
    """To the byte, P parameters of ViT-B/16 and the padding with them taking what `BYTES` says."""
    store = _model_store(
        "vit_b16", stage, planned(ranks // 2, data=ranks), weights=weights, gradient_dtype=gradients
    )  # fmt: skip
    padded = sum(bucket.numel for bucket in store.buckets)
    whole, shared = BYTES[weights, gradients][stage]
    if ranks == 1:  # what is shared out among one is not
        whole, shared = BYTES[weights, gradients][0]
    memory = store.memory()
    moments = _adamw_bytes(store)
    trained = sum(bucket.trained.stop - bucket.trained.start for bucket in store.buckets)
    assert trained == padded // (ranks if stage else 1)
    held = memory["weights"] + memory["masters"] + memory["gradients"]
    assert (held + 8 * trained) * ranks == padded * (whole * ranks + shared)
    # the moments are those of spans, which leave out the padding at the end of buckets and between groups
    assert 0 <= 8 * trained - moments <= 8 * (padded - sum(slot.numel for slot in store.slots))
    assert moments == 8 * sum(span.weight.numel() for span in store.fragments().spans)
    assert moments % 8 == 0 and all(t.device == META for bucket in store.buckets for t in (bucket.weights, bucket.sums))


def test_padding_is_below_one_per_cent() -> None:
    for where in ({}, {"data": 8}, {"data": 64}, {"data": 4, "tensor": 4}, {"data": 2, "context": 2, "tensor": 3}):
        for rank in {0, _size(where) - 1}:
            store = _model_store("vit_b16", 3, planned(rank, **where))
            padded, parameters = sum(b.numel for b in store.buckets), sum(slot.numel for slot in store.slots)
            assert parameters > 86e6 / where.get("tensor", 1)
            assert parameters <= padded < 1.01 * parameters, where


def test_moments_are_shared_out_evenly() -> None:
    for stage in (1, 2, 3):
        stores = [_model_store("vit_b16", stage, planned(rank, data=8)) for rank in range(8)]
        parameters = sum(slot.numel for slot in stores[0].slots)
        found = [_adamw_bytes(store) for store in stores]
        assert 8 * parameters <= sum(found) < 1.01 * 8 * parameters
        assert max(found) < 1.01 * parameters


def test_buffers_of_a_real_model() -> None:
    largest = max(bucket.numel for bucket in _model_store("vit_b16", 3, planned(data=4)).buckets)
    kept, staged = (
        _model_store("vit_b16", stage, planned(data=4), weights=torch.bfloat16).memory() for stage in (1, 3)
    )
    # two units whole to be sent, where they are not kept; two that arrive, of which there is a sum of this shard
    assert kept["gather buffers"] == 0 and kept["reduction buffers"] == 2 * 4 * largest // 4
    assert staged["gather buffers"] == 2 * 2 * largest
    assert staged["reduction buffers"] == 2 * 4 * largest + 2 * 4 * largest // 4
    never = _model_store("vit_b16", 3, planned(data=4), gather=float("inf"))
    assert never.memory()["gather buffers"] == 4 * sum(bucket.numel for bucket in never.buckets)
    assert len(never.gatherer.buffers) == len(never.units)


def _arriving(store: ParameterStore) -> int:
    """Bytes of what arrives in the largest unit's reduction: on CPUs the shard from each rank, else its sum."""
    whole = store.device.type == "cpu"
    return max(
        sum(-(-(b.numel if whole else b.share) * b.gradient_dtype.itemsize // 64) * 64 for b in unit.buckets)
        for unit in store.units
    )


def _allocated(store: ParameterStore) -> int:
    """Bytes of all memory that the store can reach, each counted once."""
    found = [store.gradients.buffers, [buffer.memory for buffer in store.gatherer.buffers]]
    found += [[t for t in vars(bucket).values() if isinstance(t, Tensor)] for bucket in store.buckets]
    found += [[t for t in (slot.grad, slot.parameter) if t is not None] for slot in store.slots]
    found += [[span.weight, span.grad] for span in store.fragments().spans]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for held in found for t in held}
    return sum(storages.values())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("weights", "gradients"), list(BYTES), ids=str)
def test_a_plan_takes_as_much_as_what_is_allocated(
    weights: torch.dtype, gradients: torch.dtype | None, stage: int
) -> None:
    where = {"data": 2, "tensor": 2}
    options = {"weights": weights, "gradient_dtype": gradients, "gather": 3e5, "unit_bytes": 1 << 17}
    for reduce in ("step", "micro_batch")[stage >= 2 :]:
        plan = _model_store("small", stage, planned(3, **where), META, reduce=reduce, **options)
        real = _model_store("small", stage, planned(3, **where), CPU, reduce=reduce, **options)
        on_cpu = 2 * (_arriving(real) - _arriving(plan))
        assert real.memory() == plan.memory() | {"reduction buffers": plan.memory()["reduction buffers"] + on_cpu}
        assert _adamw_bytes(plan) == _adamw_bytes(real)
        assert sum(real.memory().values()) == _allocated(real)
