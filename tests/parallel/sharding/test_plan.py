"""Units and buckets: which parameters lie together, in which order, and where."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from parallel.comm import Axis
from parallel.layout import info_of
from parallel.sharding import Group, ShardingPolicy
from parallel.sharding.plan import ALIGN, BucketKind, Geometry, UnitPlan, plan_units
from parallel.sharding.store import by_decay, in_fp32
from tests.parallel.sharding.modules import Holder, NamedLayers, make_store, parameter, planned

FP32 = BucketKind(partial=False, dtype=torch.float32, trains=True)
PARTIAL, FROZEN = FP32._replace(partial=True), FP32._replace(trains=False)
BF16 = FP32._replace(dtype=torch.bfloat16)


def _plan(layers: NamedLayers, unit_bytes: int = 0, tensor_size: int = 1, **functions) -> list[UnitPlan]:
    functions = {"group_of": by_decay, "dtype_of": in_fp32} | functions
    return plan_units(layers, tensor_size=tensor_size, unit_bytes=unit_bytes, **functions)


def _layers_of(units: list[UnitPlan]) -> list[tuple[str, ...]]:
    return [unit.layers for unit in units]


def _names(unit: UnitPlan) -> dict[BucketKind, list[str]]:
    return {kind: [member.names[0] for member in members] for kind, members in unit.buckets.items()}


def _sized(**elements: int) -> NamedLayers:
    return [(name, Holder(weight=parameter(count))) for name, count in elements.items()]


def test_small_layers_are_grouped_and_large_ones_stay_alone() -> None:
    layers = _sized(a=100, b=300, c=600, d=1000, e=5000, f=10, g=10)
    assert _layers_of(_plan(layers, 4000)) == [("a", "b", "c"), ("d",), ("e",), ("f", "g")]
    assert _layers_of(_plan(layers, 4001)) == [("a", "b", "c", "d"), ("e",), ("f", "g")]
    assert _layers_of(_plan(layers, 0)) == [(name,) for name in "abcdefg"]
    assert _layers_of(_plan(layers, 1 << 30)) == [tuple("abcdefg")]


def test_layers_that_nothing_goes_backward_through_are_apart() -> None:
    layers = _sized(a=10, b=10, c=10, d=10, e=10)
    assert _layers_of(_plan(layers, 1 << 30, forward_only={"a", "c", "d"})) == [("a",), ("b",), ("c", "d"), ("e",)]


def test_layers_without_parameters_join_their_neighbours() -> None:
    layers = [*_sized(a=10), ("empty", nn.Identity()), *_sized(b=10), ("last", nn.Identity())]
    assert _layers_of(_plan(layers, 80)) == [("a", "empty", "b"), ("last",)]
    assert _plan(layers, 80)[1].buckets == {}


def test_units_go_by_logical_sizes() -> None:
    """5 heads over 2 ranks: 3 and 2, but ranks of the tensor axis must issue the same collectives."""
    found = []
    for index in (0, 1):
        tensor = Axis(name="tensor", ranks=(0, 1), index=index, planned=True)
        heads = [
            (f"blocks.{i}", Holder(weight=parameter(5 * 8, tensor=tensor, unit=8), norm=parameter(8, partial=True)))
            for i in range(4)
        ]
        found.append(_plan(heads, unit_bytes=2 * 4 * 40, tensor_size=2))
    first, second = found
    assert _layers_of(first) == _layers_of(second) == [("blocks.0", "blocks.1"), ("blocks.2", "blocks.3")]
    for a, b in zip(first, second, strict=True):
        assert _names(a) == _names(b)
        assert list(a.buckets) == list(b.buckets)
        assert [member.numel(0) for member in a.buckets[FP32]] == [24, 24]
        assert [member.numel(1) for member in a.buckets[FP32]] == [16, 16]
        for kind in a.buckets:  # whoever asks
            for rank in (0, 1):
                assert Geometry.of(a.buckets[kind], rank, 2) == Geometry.of(b.buckets[kind], rank, 2)


def test_a_bucket_per_dtype_and_way_to_be_summed() -> None:
    layers = [
        ("a", Holder(w=parameter(4), norm=parameter(4, partial=True))),
        ("b", Holder(w=parameter(4), norm=parameter(4, partial=True), frozen=parameter(4, frozen=True))),
    ]
    (unit,) = _plan(layers, 1 << 20, tensor_size=2, dtype_of=lambda n: BF16.dtype if n == "a.w" else FP32.dtype)
    assert _names(unit) == {BF16: ["a.w"], FP32: ["b.w"], PARTIAL: ["b.norm", "a.norm"], FROZEN: ["b.frozen"]}
    (unit,) = _plan(layers, 1 << 20)  # one tensor rank sums nothing
    assert _names(unit) == {FP32: ["b.norm", "b.w", "a.norm", "a.w"], FROZEN: ["b.frozen"]}


def test_the_order_of_buckets_does_not_depend_on_that_of_parameters() -> None:
    one = Holder(a=parameter(4), b=parameter(4, partial=True), c=parameter(4, frozen=True))
    other = Holder(c=parameter(4, frozen=True), b=parameter(4, partial=True), a=parameter(4))
    (first,), (second,) = (_plan([("x", layer)], tensor_size=2) for layer in (one, other))
    assert list(first.buckets) == list(second.buckets)


def test_members_lie_in_backward_order_by_group_and_copies_last() -> None:
    tensor = Axis(name="tensor", ranks=(0, 1), index=0, planned=True)
    layers = [
        (
            f"blocks.{i}",
            Holder(
                copy=parameter(4),
                split=parameter(4, 3, tensor=tensor, decay="body"),
                bias=parameter(4, tensor=tensor),
                plain=parameter(4, decay="body"),
            ),
        )
        for i in (0, 1)
    ]
    (unit,) = _plan(layers, 1 << 20, tensor_size=2)
    split, copies = ["1.split", "0.split", "1.bias", "0.bias"], ["1.plain", "0.plain", "1.copy", "0.copy"]
    assert _names(unit)[FP32] == [f"blocks.{name}" for name in split + copies]
    (unit,) = _plan(layers, 1 << 20, tensor_size=2, group_of=lambda n, info: Group(info.decay, -int(n[7])))
    deepest_first = ["1.split", "0.split", "1.bias", "0.bias", "1.plain", "0.plain", "1.copy", "0.copy"]
    assert _names(unit)[FP32] == [f"blocks.{name}" for name in deepest_first]
    groups = [member.group for member in unit.buckets[FP32]]
    assert groups == [Group(*group) for group in (("body", -1), ("body", 0), ("none", -1), ("none", 0))] * 2


# -- tied parameters ---------------------------------------------------------------------------------------------------


def test_tied_in_one_layer() -> None:
    shared = parameter(4)
    layers = [("a", Holder(one=shared, other=shared, own=parameter(4))), ("b", Holder(w=parameter(4)))]
    first, second = _plan(layers)
    assert [member.names for member in first.buckets[FP32]] == [("a.own",), ("a.one", "a.other")]
    assert _names(second) == {FP32: ["b.w"]}
    store = make_store(layers)
    assert [slot.uses for slot in store.units[0].slots] == [1, 2]
    holder = layers[0][1]
    assert holder.one is holder.other and holder.one.device.type == "cpu"


def test_tied_in_layers_far_apart_joins_all_between() -> None:
    shared = parameter(100)
    layers = _sized(a=100, b=100, c=100, d=100, e=100, f=100)
    for at in (1, 4):
        layers[at][1].shared = shared
    units = _plan(layers)
    assert _layers_of(units) == [("a",), ("b", "c", "d", "e"), ("f",)]
    assert _names(units[1])[FP32] == ["e.weight", "d.weight", "c.weight", "b.shared", "b.weight"]
    store = make_store(layers)
    assert layers[1][1].shared is layers[4][1].shared
    assert [slot.member.names for slot in store.slots if slot.uses == 2] == [("b.shared", "e.shared")]


def test_ties_that_overlap_are_joined_too() -> None:
    layers = _sized(a=1, b=1, c=1, d=1, e=1)
    one, other = parameter(4), parameter(4)
    for at, shared in ((0, one), (2, one), (1, other), (3, other)):
        setattr(layers[at][1], f"shared_{id(shared)}", shared)
    assert _layers_of(_plan(layers)) == [("a", "b", "c", "d"), ("e",)]


def test_a_layer_that_is_used_twice() -> None:
    layer = Holder(w=parameter(4), b=parameter(2))
    (unit,) = _plan([("a", layer), ("b", layer)])
    assert unit.layers == ("a", "b")
    assert [member.names for member in unit.buckets[FP32]] == [("a.b", "b.b"), ("a.w", "b.w")]


def test_names_are_not_mixed_up_by_prefixes() -> None:
    layers = [(f"blocks.{i}", Holder(w=parameter(4))) for i in (1, 10, 11, 2)]
    layers[1][1].shared = layers[3][1].shared = shared = parameter(4)
    assert _layers_of(_plan(layers)) == [("blocks.1",), ("blocks.10", "blocks.11", "blocks.2")]
    make_store(layers)
    assert layers[1][1].shared is layers[3][1].shared is not shared
    assert layers[0][1].w is not layers[1][1].w


# -- frozen parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parameters_have_no_gradient_and_are_not_trained(stage: int) -> None:
    layers = [
        ("a", Holder(w=parameter(40), frozen=parameter(50, frozen=True))),
        ("b", Holder(frozen=parameter(30, frozen=True))),
    ]
    policy = ShardingPolicy(stage=stage, reduce="micro_batch" if stage > 1 else "step", unit_bytes=0)
    store = make_store(layers, policy, grid=planned(data=2))
    frozen = [bucket for bucket in store.buckets if not bucket.kind.trains]
    assert [[slot.name for slot in bucket.slots] for bucket in frozen] == [["a.frozen"], ["b.frozen"]]
    for bucket in frozen:
        assert bucket.sums.numel() == 0 and bucket.grads is None
        assert bucket.weights.numel() == (bucket.share if stage == 3 else bucket.numel)
        assert not any(slot.parameter.requires_grad for slot in bucket.slots)
        assert set(bucket.tensors()) == {"weights", "masters", "gradients"}
        assert sum(t.numel() for held in bucket.tensors().values() for t in held if held) == bucket.weights.numel()
    fragments = store.fragments()
    assert {f.name for f in fragments.fragments} == set(fragments.owned) == set(fragments.trained) == {"a.w"}
    assert [slot.name for unit in store.gradients.units for slot in unit.slots] == ["a.w"]
    if stage == 3:
        assert [len(unit.gathered) for unit in store.units] == [2, 1]


# -- offsets and shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_geometry(replicas: int) -> None:
    sizes = [1, 16, 17, 100, 3]
    (unit,) = _plan([("a", Holder(**{f"p{i}": parameter(size) for i, size in enumerate(sizes)}))])
    members = unit.buckets[FP32]
    offsets, share = Geometry.of(members, 0, replicas)
    assert all(offset % ALIGN == 0 for offset in (*offsets, share))
    assert offsets == (0, 16, 128, 160, 176)  # of 3, 100, 17, 16, 1 elements
    for (start, stop), member in zip(pairwise((*offsets, share * replicas)), members, strict=True):
        assert stop - start >= member.numel(0)
    assert 192 <= share * replicas < 192 + replicas * ALIGN  # no longer than it must be


def test_a_scalar_and_nothing_at_all() -> None:
    (unit,) = _plan([("a", Holder(scale=parameter()))])
    assert Geometry.of(unit.buckets[FP32], 0, 2) == Geometry((0,), 16)
    assert Geometry.of([], 0, 4) == Geometry((), 0)
    assert info_of(parameter()).layout.shape == ()
