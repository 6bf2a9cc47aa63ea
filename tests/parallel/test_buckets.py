"""Flat buckets: what lies where, what is summed over whom, and when."""

import pytest
import torch
from torch import Tensor, nn

from parallel import comm
from parallel.comm import Axis, Pending, World
from parallel.grid import Grid, GridShape, make_grid
from parallel.layout import Init, ParameterInfo, TensorLayout, info_of, make_parameter
from parallel.random import fill, key
from parallel.sharding import BucketKind, GradientBuffer
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel
from tests.distributed import run_ranks

CPU = torch.device("cpu")
BACKWARD_ORDER = ["head.bias", "head.weight", "second.bias", "second.weight", "first.bias", "first.weight"]


class Net(nn.Module):
    """Three linears: three kinds of parameter on one rank."""

    def __init__(self) -> None:
        super().__init__()
        tp = no_tensor_parallel()
        self.first = ColumnParallelLinear(4, (4,), tp=tp)
        self.second = ColumnParallelLinear(4, (3,), tp=tp)
        self.head = ColumnParallelLinear(3, (6,), tp=tp, decay="head")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def _buffer(grid: Grid | None = None, bucket_bytes: int = 1 << 20) -> tuple[Net, GradientBuffer]:
    net = Net()
    return net, GradientBuffer(net, grid=grid or make_grid(GridShape()), device=CPU, seed=1, bucket_bytes=bucket_bytes)


def _inputs(count: int) -> list[Tensor]:
    return list(torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(0)))


def _loss(net: Net, x: Tensor) -> Tensor:
    return (net(x) ** 2).sum()


def _plain_gradients(net: Net, inputs: list[Tensor]) -> dict[str, Tensor]:
    """By autograd alone, on copies of the parameters in torch's own linears."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    for x in inputs:
        for name in ("first", "second"):
            x = nn.functional.linear(x, leaves[f"{name}.weight"], leaves[f"{name}.bias"]).tanh()
        (nn.functional.linear(x, leaves["head.weight"], leaves["head.bias"]) ** 2).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _assert_gradients(buffer: GradientBuffer, expected: dict[str, Tensor]) -> None:
    assert {slot.name for slot in buffer.slots} == set(expected)
    for slot in buffer.slots:
        torch.testing.assert_close(slot.grad, expected[slot.name], rtol=1e-5, atol=1e-6)


def test_parameters_and_gradients_are_views_of_flat_tensors() -> None:
    net, buffer = _buffer()
    named = dict(net.named_parameters())
    assert {slot.name for slot in buffer.slots} == set(named)
    for bucket in buffer.buckets:
        buffer_end = 0
        for slot in bucket.slots:
            assert slot.parameter is named[slot.name]
            assert slot.offset >= buffer_end and slot.offset % 16 == 0
            buffer_end = slot.offset + slot.parameter.numel()
            layout, init = info_of(slot.parameter).layout, info_of(slot.parameter).init
            expected = torch.empty(layout.shape)
            fill(expected, layout, init, key(1, slot.name))
            assert torch.equal(slot.parameter, expected)
        assert buffer_end <= bucket.parameters.numel() == bucket.grads.numel()
        with torch.no_grad():
            bucket.parameters.fill_(2)
            bucket.grads.fill_(3)
        assert all((slot.parameter == 2).all() and (slot.grad == 3).all() for slot in bucket.slots)
    buffer.start_grad_sync(1)
    assert all(bucket.parameters.grad is bucket.grads for bucket in buffer.buckets)  # what an optimizer steps with


def test_one_bucket_per_kind_unless_full() -> None:
    _, buffer = _buffer()
    assert [[slot.name for slot in bucket.slots] for bucket in buffer.buckets] == [
        ["head.weight"],
        ["head.bias", "second.bias", "first.bias"],
        ["second.weight", "first.weight"],
    ]  # by when they are complete
    kinds = [BucketKind(decay=decay, sharded=False, partial=False) for decay in ("head", "none", "body")]
    assert [bucket.kind for bucket in buffer.buckets] == kinds
    _, small = _buffer(bucket_bytes=1)
    assert [slot.name for slot in small.slots] == BACKWARD_ORDER
    assert all(len(bucket.slots) == 1 for bucket in small.buckets)
    _, middle = _buffer(bucket_bytes=4 * 5)  # biases of 6, of 3 and of 4 floats
    biases = [[slot.name for slot in bucket.slots] for bucket in middle.buckets if bucket.kind.decay == "none"]
    assert biases == [["head.bias"], ["second.bias", "first.bias"]]


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_micro_batches_accumulate_and_steps_do_not(bucket_bytes: int) -> None:
    net, buffer = _buffer(bucket_bytes=bucket_bytes)
    for slot in buffer.slots:
        slot.grad.fill_(float("nan"))  # stale: the first contribution overwrites it
    for inputs in (_inputs(3), _inputs(1), _inputs(4)):
        buffer.start_grad_sync(len(inputs))
        for x in inputs:
            _loss(net, x).backward()
        buffer.finish_grad_sync()
        expected = _plain_gradients(net, inputs)
        _assert_gradients(buffer, expected)
        assert all(slot.parameter.grad is None for slot in buffer.slots)
        squares = sum(grad.square().sum() for grad in expected.values())
        torch.testing.assert_close(buffer.squared_norm(count_copies=True), squares)


def test_each_bucket_is_reduced_once_and_early(monkeypatch: pytest.MonkeyPatch) -> None:
    net, buffer = _buffer(bucket_bytes=1)
    names = {bucket.grads.data_ptr(): bucket.slots[0].name for bucket in buffer.buckets}
    log: list[tuple[str, list[str]]] = []  # reduced, and what was still missing then

    def start(x: Tensor, axis: Axis) -> Pending:
        if axis.name != "tensor":  # the linears' own, on one rank
            log.append((names[x.data_ptr()], [slot.name for slot in buffer.slots if slot.missing]))
        return Pending(x)

    monkeypatch.setattr(comm, "reduce_scatter_rows_start", start)
    for _ in range(2):
        log.clear()
        buffer.start_grad_sync(2)
        first, second = _inputs(2)
        _loss(net, first).backward()
        assert not log  # not before the last micro-batch
        _loss(net, second).backward()
        assert [name for name, _ in log] == BACKWARD_ORDER
        assert "first.weight" in log[0][1] and "second.weight" in log[0][1]  # the head's, while the others compute
        assert all(name not in missing for name, missing in log)
        buffer.finish_grad_sync()
        assert len(log) == len(BACKWARD_ORDER)


def test_order_of_reductions_is_that_of_the_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order gradients come in: other ranks could see another one, and collectives must match."""
    _, buffer = _buffer(bucket_bytes=1)
    reduced: list[int] = []
    order = {bucket.grads.data_ptr(): i for i, bucket in enumerate(buffer.buckets)}
    monkeypatch.setattr(
        comm, "reduce_scatter_rows_start", lambda x, axis: reduced.append(order[x.data_ptr()]) or Pending(x)
    )
    buffer.start_grad_sync(1)
    slots = {slot.name: slot for slot in buffer.slots}
    for name in reversed(BACKWARD_ORDER):
        assert not reduced
        slots[name].parameter.sum().backward()
    assert reduced == list(range(len(BACKWARD_ORDER)))


def test_a_missing_or_surplus_contribution_is_an_error() -> None:
    net, buffer = _buffer()
    buffer.start_grad_sync(2)
    _loss(net, _inputs(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"no complete gradient for head\.weight, head\.bias, .* \.\.\."):
        buffer.finish_grad_sync()
    buffer.start_grad_sync(1)
    net.first(_inputs(1)[0]).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"no complete gradient for head\.weight, head\.bias, second\.bias, second\.weight$"
    ):
        buffer.finish_grad_sync()
    buffer.start_grad_sync(1)
    _loss(net, _inputs(1)[0]).backward()
    with pytest.raises(AssertionError, match="more gradients than micro-batches"):
        _loss(net, _inputs(1)[0]).backward()


def test_products_can_be_put_off() -> None:
    net, buffer = _buffer()
    inputs = _inputs(3)
    buffer.start_grad_sync(3)
    put_off = []
    for x in inputs[:2]:
        with buffer.deferring() as products:
            _loss(net, x).backward()
        put_off.append(products)
    assert [len(products) for products in put_off] == [3, 3]
    slots = {slot.name: slot for slot in buffer.slots}
    assert slots["first.weight"].fresh and not slots["first.bias"].fresh  # only matrix products wait
    _loss(net, inputs[2]).backward()  # not put off
    assert not slots["first.weight"].fresh
    for products in put_off:
        for product in products:
            product()
    buffer.finish_grad_sync()
    _assert_gradients(buffer, _plain_gradients(net, inputs))


def test_deferring_ends_with_an_error_too() -> None:
    net, buffer = _buffer()
    with pytest.raises(KeyError), buffer.deferring():
        raise KeyError
    buffer.start_grad_sync(1)
    _loss(net, _inputs(1)[0]).backward()
    buffer.finish_grad_sync()


# -- on 2 x 2 ranks ----------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """One parameter of each way to be spread over two tensor ranks."""

    def __init__(self, tensor: Axis) -> None:
        super().__init__()
        init = Init(kind="normal", scales=(1.0,))
        split = TensorLayout(shape=(7, 2), dim=0, segments=(7,), parts=tensor.size, index=tensor.index)
        whole = TensorLayout(shape=(5,))
        self.sharded = make_parameter(ParameterInfo(layout=split, init=init, decay="body"))
        self.copy = make_parameter(ParameterInfo(layout=whole, init=init))
        self.partial = make_parameter(ParameterInfo(layout=whole, init=init, partial_over_tensor=True))


def _reduce(world: World) -> tuple[dict[str, Tensor], dict[str, BucketKind], float, dict[str, int]]:
    grid = make_grid(GridShape(data=2, tensor=2), world)
    module = Kinds(grid.tensor)
    buffer = GradientBuffer(module, grid=grid, device=CPU, seed=0)
    own = {"sharded": 2.0**world.rank, "copy": 10.0**grid.data.index, "partial": 2.0**world.rank}
    grid.meter.reset()
    buffer.start_grad_sync(2)
    for _ in range(2):
        torch.stack([(value * module.get_parameter(name)).sum() for name, value in own.items()]).sum().backward()
    buffer.finish_grad_sync()
    calls = dict(grid.meter.calls)
    squares = comm.all_reduce(buffer.squared_norm(count_copies=grid.tensor.index == 0), grid.world)
    gradients = {slot.name: slot.grad.clone() for slot in buffer.slots}
    return gradients, {b.slots[0].name: b.kind for b in buffer.buckets}, squares.item(), calls


def test_sums_over_the_right_ranks() -> None:
    results = run_ranks(4, _reduce)
    for rank, (gradients, kinds, squares, calls) in enumerate(results):
        tensor = rank % 2
        own = 2 * (2**tensor + 2 ** (tensor + 2))  # over the data axis; two micro-batches
        assert torch.equal(gradients["sharded"], torch.full((4 - tensor, 2), own)), rank
        assert torch.equal(gradients["copy"], torch.full((5,), 2 * 11.0))
        assert torch.equal(gradients["partial"], torch.full((5,), 2 * 15.0))
        assert kinds["sharded"] == BucketKind(decay="body", sharded=True, partial=False)
        assert kinds["copy"] == BucketKind(decay="none", sharded=False, partial=False)
        assert kinds["partial"] == BucketKind(decay="none", sharded=False, partial=True)
        assert calls == {"reduce_scatter": 3, "all_gather": 3}
        logical = 4 * 2 * 10.0**2 + 3 * 2 * 20.0**2 + 5 * 22.0**2 + 5 * 30.0**2  # each element once
        assert squares == pytest.approx(logical)
