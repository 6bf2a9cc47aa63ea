"""Gradients: what is added up, what is sent when and in which order, and what comes of it on several ranks.

On one process a planned grid and a fake wire stand in for ranks that all hold the same; values on several ranks are
checked with real ones.
"""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from parallel import comm
from parallel.comm import Axis
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from parallel.sharding import ParameterStore
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel
from tests.distributed import run_ranks
from tests.parallel.sharding.modules import (
    NET_ORDER,
    FakeWire,
    Holder,
    NamedLayers,
    Net,
    fake_wire,
    make_store,
    net_inputs,
    net_loss,
    parameter,
    plain_gradients,
    planned,
    policy_of,
)

Gradients = dict[str, Tensor]
# (ZeRO stage, when sums are taken) in all combinations that there are
WAYS = [(0, "step"), (0, "micro_batch"), (1, "step"), (1, "micro_batch"), (2, "micro_batch"), (3, "micro_batch")]


def _net(**options) -> tuple[Net, ParameterStore]:
    net = Net()
    store = make_store(net.layers, **options)
    for buffer in store.gradients.buffers:
        buffer.fill_(255)  # NaN in every format: what is not written over would show
    return net, store


def _values(store: ParameterStore) -> Gradients:
    return {name: value.clone() for name, value in store.local_values().items()}


def _assert_close(found: Gradients, expected: Gradients) -> None:
    assert set(found) == set(expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# -- one rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_bytes", [0, 1 << 20])
def test_micro_batches_accumulate_and_steps_do_not(unit_bytes: int) -> None:
    net, store = _net(policy=policy_of(0, unit_bytes=unit_bytes))
    values = _values(store)
    for slot in store.slots:
        slot.grad.fill_(float("nan"))  # stale: the first contribution overwrites it
    for inputs in (net_inputs(3), net_inputs(1), net_inputs(4)):
        store.gradients.start(len(inputs))
        for x in inputs:
            net_loss(net, x).backward()
        store.gradients.finish()
        expected = plain_gradients(values, inputs)
        _assert_close(store.local_values("sums"), expected)
        assert all(slot.parameter.grad is None for slot in store.slots)
        squares = sum(grad.double().square().sum() for grad in expected.values())
        torch.testing.assert_close(store.gradients.squared_norm(), squares, rtol=1.3e-6, atol=1e-5)


def test_gradients_are_views_of_flat_tensors() -> None:
    net, store = _net(policy=policy_of(0, unit_bytes=1 << 20))
    (bucket,) = store.buckets
    assert {slot.name for slot in bucket.slots} == set(dict(net.named_parameters()))
    with torch.no_grad():
        bucket.weights.fill_(2)
        bucket.sums.fill_(3)
    assert all((slot.parameter == 2).all() and (slot.grad == 3).all() for slot in bucket.slots)
    assert all(dict(net.named_parameters())[slot.name] is slot.parameter for slot in bucket.slots)


def test_one_rank_sends_nothing_and_has_no_buffers() -> None:
    for stage, reduce in WAYS:
        with fake_wire() as wire:
            net, store = _net(policy=policy_of(stage, reduce=reduce))
            store.gradients.start(2)
            for x in net_inputs(2):
                net_loss(net, x).backward()
            store.gradients.finish()
            assert not wire.reduced and not wire.gathered
            assert sum(buffer.nbytes for buffer in store.gradients.buffers) == 0


def test_a_missing_or_surplus_contribution_is_an_error() -> None:
    net, store = _net()
    sync, x = store.gradients, net_inputs(1)[0]
    sync.start(2)
    net_loss(net, x).backward()
    with pytest.raises(RuntimeError, match=r"no complete gradient for head\.weight, head\.bias, .* \.\.\.$"):
        sync.finish()
    sync.start(1)
    net.first(x).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"no complete gradient for head\.weight, head\.bias, second\.weight, second\.bias$"
    ):
        sync.finish()
    sync.start(1)
    net_loss(net, x).backward()
    with pytest.raises(AssertionError, match="more gradients than micro-batches"):
        net_loss(net, x).backward()
    sync.start(2)
    net.first(x).sum().backward()
    with pytest.raises(AssertionError, match=r"first\.\w+ got more gradients than micro-batches"):
        net.first(x).sum().backward()  # the second micro-batch, before the first is complete
    sync.start(1)
    net_loss(net, x).backward()
    sync.finish()


def test_products_can_be_put_off() -> None:
    """All contributions wait for their weight-gradient action, those of biases too."""
    net, store = _net()
    values, inputs = _values(store), net_inputs(3)
    store.gradients.start(3)
    put_off = []
    for x in inputs[:2]:
        with store.gradients.deferring() as products:
            net_loss(net, x).backward()
        put_off.append(products)
    assert [len(products) for products in put_off] == [6, 6]
    assert all(slot.fresh and slot.missing == 1 for slot in store.slots)
    net_loss(net, inputs[2]).backward()  # not put off
    assert not any(slot.fresh for slot in store.slots)
    for products in put_off:
        for product_ in products:
            product_()
    store.gradients.finish()
    _assert_close(store.local_values("sums"), plain_gradients(values, inputs))


def test_what_a_product_waits_with_is_its_own() -> None:
    """Not gathered weights, as the probe of a pooling layer is, whose memory another unit has by then."""
    _, store = _net()
    slot = next(slot for slot in store.slots if slot.parameter.ndim == 2)
    rows, columns = slot.parameter.shape
    lent, kept = torch.ones(2, columns), torch.ones(2, columns)
    store.gradients._is_lent = lambda x: x.untyped_storage().data_ptr() == lent.untyped_storage().data_ptr()
    for x in (lent, kept):
        store.gradients.start(1)
        with store.gradients.deferring() as products:
            store.gradients.add_product(slot.parameter, torch.ones(2, rows), x[:])
        x.fill_(float("nan"))
        products[0]()
        assert slot.grad is not None and bool(slot.grad.isnan().any()) == (x is kept)


def test_nothing_is_staged_or_sent_while_products_wait() -> None:
    with fake_wire() as wire:
        net, store = _net(policy=policy_of(2), grid=planned(data=2))
        store.gradients.start(1)
        with store.gradients.deferring() as products:
            net_loss(net, net_inputs(1)[0]).backward()
        assert not wire.reduced and len(store.gradients.buffers) == 4
        for product_ in products:
            product_()
        assert len(wire.reduced) == 3
        store.gradients.finish()


def test_deferring_ends_with_an_error_too() -> None:
    net, store = _net()
    with pytest.raises(KeyError), store.gradients.deferring():
        raise KeyError
    store.gradients.start(1)
    net_loss(net, net_inputs(1)[0]).backward()
    store.gradients.finish()


def test_nothing_trained_is_no_error() -> None:
    frozen = Holder(w=parameter(8, frozen=True))
    store = make_store([("a", frozen), ("empty", nn.Identity())])
    store.gradients.start(2)
    store.gradients.finish()
    assert store.gradients.squared_norm().tolist() == 0.0
    assert store.fragments().fragments == []


# -- tied parameters ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Three linears [4, 4]; the first and the last have one weight. How it is used: through linears, which hand
    products to the sink, through autograd alone, or one way at each place.
    """

    def __init__(self, ways: tuple[str, str]) -> None:
        super().__init__()
        linears = [ColumnParallelLinear(4, (4,), tp=no_tensor_parallel()) for _ in range(3)]
        self.first, self.second, self.last = linears
        self.last.weight = self.first.weight
        self.ways = ways

    @property
    def layers(self) -> NamedLayers:
        return [("first", self.first), ("second", self.second), ("last", self.last)]

    def _use(self, layer: nn.Module, x: Tensor, way: str) -> Tensor:
        return layer(x) if way == "sink" else nn.functional.linear(x, layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self._use(self.first, x, self.ways[0]).tanh()
        return self._use(self.last, self.second(x).tanh(), self.ways[1])


def _tied_reference(values: Gradients, inputs: list[Tensor]) -> Gradients:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    for x in inputs:
        x = nn.functional.linear(x, leaves["first.weight"], leaves["first.bias"]).tanh()
        x = nn.functional.linear(x, leaves["second.weight"], leaves["second.bias"]).tanh()
        (nn.functional.linear(x, leaves["first.weight"], leaves["last.bias"]) ** 2).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("ways", list(product(("sink", "autograd"), repeat=2)), ids="-".join)
def test_tied_parameters_get_all_their_contributions(ways: tuple[str, str], deferred: bool) -> None:
    net = Tied(ways)
    store = make_store(net.layers, policy_of(0))
    assert len(store.units) == 1
    values, inputs = _values(store), net_inputs(3)
    for _ in range(2):
        store.gradients.start(3)
        for x in inputs:
            if deferred:
                with store.gradients.deferring() as products:
                    net_loss(net, x).backward()
                for product_ in products:
                    product_()
            else:
                net_loss(net, x).backward()
        store.gradients.finish()
        _assert_close(store.local_values("sums"), _tied_reference(values, inputs))


@pytest.mark.parametrize("ways", list(product(("sink", "autograd"), repeat=2)), ids="-".join)
def test_tied_parameters_are_sent_when_they_are_whole(ways: tuple[str, str]) -> None:
    with fake_wire() as wire:
        net = Tied(ways)
        store = make_store(net.layers, policy_of(2), grid=planned(data=2))
        sync = store.gradients
        wire.on_reduce = lambda _: sent.append([slot.missing for slot in store.slots])
        sent: list[list[int]] = []
        values, inputs = {slot.name: slot.parameter.detach().clone() for slot in store.slots}, net_inputs(2)
        sync.start(2)
        for x in inputs:
            net_loss(net, x).backward()
        sync.finish()
        assert sent == [[0, 0, 0, 0, 0]] * 2
        _assert_shards(store, _tied_reference(values, inputs), factor=2)


def _assert_shards(store: ParameterStore, expected: Gradients, factor: float) -> None:
    """This rank's shards hold `factor` times the gradient, and zeros between."""
    for bucket in store.buckets:
        whole = torch.zeros(bucket.numel)
        for slot in bucket.slots:
            slot.view(whole).copy_(expected[slot.name])
        torch.testing.assert_close(bucket.own_sums, factor * whole[bucket.shard], rtol=1e-5, atol=1e-6)


# -- when and in which order -------------------------------------------------------------------------------------------


def _log_units(store: ParameterStore, wire: FakeWire) -> list[str]:
    """Fills with the layer of each reduction that is started. Layers must differ in size."""
    layers = {bucket.numel: unit.layers[0] for unit in store.units for bucket in unit.buckets}
    assert len(layers) == len(store.units)
    log: list[str] = []
    wire.on_reduce = lambda x: log.append(layers[x.numel()])
    return log


@pytest.mark.parametrize(("stage", "reduce"), WAYS)
def test_each_unit_is_reduced_in_time_and_no_earlier(stage: int, reduce: str) -> None:
    with fake_wire() as wire:
        net, store = _net(policy=policy_of(stage, reduce=reduce, gather=1e9), grid=planned(data=2))
        log = _log_units(store, wire)
        note, late = wire.on_reduce, []  # the layers that still miss something when another's reduction is started

        def on_reduce(x: Tensor) -> None:
            note(x)
            late.append({slot.name.split(".")[0] for slot in store.slots if slot.missing})

        wire.on_reduce = on_reduce
        early = NET_ORDER if reduce == "micro_batch" else []
        for _ in range(2):
            log.clear()
            late.clear()
            store.gradients.start(2)
            first, second = net_inputs(2)
            net_loss(net, first).backward()
            assert log == early
            net_loss(net, second).backward()
            assert log == [*early, *NET_ORDER]
            store.gradients.finish()
            assert log == [*early, *NET_ORDER]
            assert late[-3:] == [{"second", "first"}, {"first"}, set()]  # the head's, while the others compute


@pytest.mark.parametrize(("stage", "reduce"), WAYS)
def test_the_order_of_reductions_is_fixed(stage: int, reduce: str) -> None:
    """Whatever order gradients come in: other ranks could see another one, and collectives must match."""
    with fake_wire() as wire:
        _, store = _net(policy=policy_of(stage, reduce=reduce, gather=1e9), grid=planned(data=2))
        log = _log_units(store, wire)
        slots = {slot.name: slot for slot in store.slots}
        if stage == 3:
            for unit in store.units:
                store.gatherer.use(unit.index)
        for order in (["first", "second", "head"], ["second", "head", "first"], NET_ORDER):
            store.gradients.start(2)
            log.clear()
            for number in (1, 2):
                before = list(log)
                for name in order:
                    for leaf in ("bias", "weight"):
                        assert "head" in order[: order.index(name) + 1] or log == before
                        (number * slots[f"{name}.{leaf}"].parameter).sum().backward()
                assert log == NET_ORDER * (number if reduce == "micro_batch" else number // 2)
            store.gradients.finish()
            ones = {name: torch.ones(slot.shape) for name, slot in slots.items()}
            _assert_shards(store, ones, factor=2 * (1 + 2))


def test_buffers_are_not_grown_step_by_step() -> None:
    for stage, reduce in WAYS:
        with fake_wire():
            net, store = _net(policy=policy_of(stage, reduce=reduce, gather=1e9), grid=planned(data=2))
            largest = max(bucket.numel for bucket in store.buckets) * 4
            places = sorted(buffer.data_ptr() for buffer in store.gradients.buffers)
            lengths = [buffer.nbytes for buffer in store.gradients.buffers if buffer.nbytes]
            assert lengths == [largest] * (4 if reduce == "micro_batch" else 2)
            for _ in range(4):
                store.gradients.start(3)
                for x in net_inputs(3):
                    net_loss(net, x).backward()
                store.gradients.finish()
                assert sorted(buffer.data_ptr() for buffer in store.gradients.buffers) == places
            assert store.memory()["reduction buffers"] == sum(lengths)


def test_spare_buffers_are_kept_for_the_next_step() -> None:
    """Three units whose gradients come in the wrong order all wait for the last: one buffer more, made once."""
    with fake_wire():
        _, store = _net(policy=policy_of(2), grid=planned(data=2))
        for _ in range(3):
            store.gradients.start(2)
            for _ in range(2):
                for slot in reversed([slot for unit in reversed(store.units) for slot in unit.slots]):
                    slot.parameter.sum().backward()
            store.gradients.finish()
            assert len(store.gradients.buffers) == 5


class _Failure(Exception):
    pass


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        raise _Failure


@pytest.mark.parametrize(("stage", "reduce"), WAYS)
def test_a_step_that_was_broken_off_does_not_spoil_the_next(stage: int, reduce: str) -> None:
    with fake_wire():
        net, store = _net(policy=policy_of(stage, reduce=reduce, gather=1e9), grid=planned(1, data=2))
        for unit in store.units:
            store.gatherer.use(unit.index)
        values = {slot.name: slot.parameter.detach().clone() for slot in store.slots}
        buffers = len(store.gradients.buffers)
        inputs = net_inputs(3)
        for good in (0, 1, 2):  # micro-batches before that which fails
            store.gradients.start(3)
            for x in inputs[:good]:
                (100 * net_loss(net, x)).backward()
            hidden = _Fails.apply(net.first(inputs[good]).tanh())
            with pytest.raises(_Failure), store.gradients.deferring() as products:
                net.head(net.second(hidden)).sum().backward()
            for product_ in products[:-1]:  # one of the layers behind the failure is complete, one is not
                product_()
            store.gradients.start(3)
            for x in inputs:
                net_loss(net, x).backward()
            store.gradients.finish()
            _assert_shards(store, plain_gradients(values, inputs), factor=2)
            assert len(store.gradients.buffers) == buffers


# -- real ranks --------------------------------------------------------------------------------------------------------


def _check_ways(world: World) -> None:
    grid = make_grid(GridShape(data=2), world)
    for (stage, reduce), unit_bytes in product(WAYS, (0, 1 << 20)):
        net, store = _net(policy=policy_of(stage, reduce=reduce, unit_bytes=unit_bytes), grid=grid)
        values = _values(store)
        for steps in (2, 3):
            store.gradients.start(steps)
            for x in net_inputs(steps, seed=world.rank):
                net_loss(net, x).backward()
            store.gradients.finish()
            everything = [x for rank in range(2) for x in net_inputs(steps, seed=rank)]
            expected = plain_gradients(values, everything)
            _assert_close(store.local_values("sums"), expected)
            squares = comm.all_reduce(store.gradients.squared_norm(), grid.world)
            exact = sum(grad.double().square().sum() for grad in expected.values())
            torch.testing.assert_close(squares, exact, rtol=1.3e-6, atol=1e-5)
            store.updated()


def _check_sixteen_bits(world: World) -> None:
    """1 on one rank and 2^-9 on the other are 1 in bf16, and so are 1 and 2^-9 of two micro-batches."""
    grid = make_grid(GridShape(data=2), world)
    small = 2.0**-9
    for stage, reduce in WAYS:
        layer = Holder(w=parameter(40))
        store = make_store(
            [("a", layer)], policy_of(stage, reduce=reduce, gradient_dtype=None), grid=grid, dtype=torch.bfloat16
        )
        (bucket,) = store.buckets
        assert bucket.gradient_dtype == torch.bfloat16 and bucket.sums.dtype == torch.float32
        assert (bucket.grads is None) == (reduce == "micro_batch")
        assert bucket.grads is None or bucket.grads.dtype == torch.bfloat16
        store.gatherer.use(0)

        def sums(*own: float, store: ParameterStore = store, layer: Holder = layer) -> Tensor:
            store.gradients.start(len(own))
            for value in own:
                (layer.w * value).sum().backward()
            store.gradients.finish()
            return store.local_values("sums")["a.w"]

        over_ranks = sums(1.0 if world.rank == 0 else small)
        assert over_ranks.dtype == torch.float32
        assert torch.equal(over_ranks, torch.full((40,), 1 + small)), (stage, reduce)
        over_micro_batches = sums(1.0, small)
        kept = 2 * (1 + small) if reduce == "micro_batch" else 2.0  # where it is kept, it is kept in bf16
        assert torch.equal(over_micro_batches, torch.full((40,), kept)), (stage, reduce)


def _check_wide_gradients(world: World) -> None:
    """fp32 gradients of bf16 weights: products are not lost, whoever takes them."""
    grid = make_grid(GridShape(data=2), world)
    for stage, reduce in WAYS:
        layer = ColumnParallelLinear(4, (3,), tp=no_tensor_parallel())
        store = make_store([("a", layer)], policy_of(stage, reduce=reduce), grid=grid, dtype=torch.bfloat16)
        store.gradients.start(2)
        for x in net_inputs(2, seed=world.rank):
            layer(x.bfloat16()).sum().backward()
        store.gradients.finish()
        found = store.local_values("sums")
        expected = sum(x.bfloat16().float().sum(0) for rank in range(2) for x in net_inputs(2, seed=rank))
        torch.testing.assert_close(found["a.weight"], expected.expand(3, 4), rtol=2e-2, atol=2e-2)
        assert torch.equal(found["a.bias"], torch.full((3,), 8.0))


def _on_two_ranks(world: World) -> None:
    _check_ways(world)
    _check_sixteen_bits(world)
    _check_wide_gradients(world)


def test_on_two_ranks() -> None:
    run_ranks(2, _on_two_ranks)


def test_sixteen_bit_gradients_on_one_rank() -> None:
    layer = Holder(w=parameter(40))
    store = make_store([("a", layer)], policy_of(0, gradient_dtype=None), dtype=torch.bfloat16)
    for value in (3.0, 5.0):
        store.gradients.start(2)
        for _ in range(2):
            (layer.w * value).sum().backward()
        store.gradients.finish()
        found = store.local_values("sums")["a.w"]
        assert found.dtype == torch.float32 and torch.equal(found, torch.full((40,), 2 * value))


def _kinds(tensor: Axis) -> Holder:
    """One parameter of each way to be spread over two tensor ranks."""
    return Holder(
        sharded=parameter(7, 2, tensor=tensor, decay="body"), copy=parameter(5), partial=parameter(5, partial=True)
    )


def _reduce(world: World) -> list[tuple[Gradients, float, dict[str, int], dict[str, bool]]]:
    grid = make_grid(GridShape(data=2, tensor=2), world)
    own = {"sharded": 2.0**world.rank, "copy": 10.0**grid.data.index, "partial": 2.0**world.rank}
    found = []
    for stage, reduce in WAYS:
        layer = _kinds(grid.tensor)
        store = make_store([("a", layer)], policy_of(stage, reduce=reduce), grid=grid)
        store.gatherer.use(0)
        grid.meter.reset()
        store.gradients.start(2)
        for _ in range(2):
            torch.stack([(value * layer.get_parameter(name)).sum() for name, value in own.items()]).sum().backward()
        store.gradients.finish()
        calls = dict(grid.meter.calls)
        squares = comm.all_reduce(store.gradients.squared_norm(), grid.world).item()
        gradients = {name: value.clone() for name, value in store.local_values("sums").items()}
        partial = {slot.name: bucket.kind.partial for bucket in store.buckets for slot in bucket.slots}
        found.append((gradients, squares, calls, partial))
    return found


def test_sums_over_the_right_ranks() -> None:
    for rank, found in enumerate(run_ranks(4, _reduce)):
        tensor = rank % 2
        own = 2 * (2**tensor + 2 ** (tensor + 2))  # over the data axis; two micro-batches
        for (stage, reduce), (gradients, squares, calls, partial) in zip(WAYS, found, strict=True):
            assert torch.equal(gradients["a.sharded"], torch.full((4 - tensor, 2), own)), rank
            assert torch.equal(gradients["a.copy"], torch.full((5,), 2 * 11.0))
            assert torch.equal(gradients["a.partial"], torch.full((5,), 2 * 15.0))
            assert partial == {"a.sharded": False, "a.copy": False, "a.partial": True}
            expected = {"reduce_scatter": 4 if reduce == "micro_batch" else 2}  # two buckets
            assert calls == expected | ({"all_gather": 2} if stage == 0 else {}), (stage, reduce)
            logical = 4 * 2 * 10.0**2 + 3 * 2 * 20.0**2 + 5 * 22.0**2 + 5 * 30.0**2  # each element once
            assert squares == pytest.approx(logical)
