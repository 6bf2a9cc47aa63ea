"""Small layers for the tests of sharding: single parameters of every sort, and linears whose gradients go to a sink."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from parallel import comm
from parallel.comm import Axis, Pending
from parallel.grid import Grid, GridShape, make_grid, planned_grid
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.sharding import ParameterStore, ShardingPolicy
from parallel.sharding.units import Unit
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel

CPU = torch.device("cpu")
NamedLayers = list[tuple[str, nn.Module]]


def parameter(
    *shape: int,
    tensor: Axis | None = None,
    unit: int = 1,
    partial: bool = False,
    decay: str = "none",
    frozen: bool = False,
) -> nn.Parameter:
    """On the meta device, normally distributed (a scalar: 1). tensor: split over this axis along dim 0, in pieces of
    `unit`.
    """
    layout = TensorLayout(shape=shape)
    if tensor is not None:
        layout = TensorLayout(
            shape=shape, dim=0, segments=shape[:1], units=(unit,), parts=tensor.size, index=tensor.index
        )
    init = Init(kind="normal" if shape else "constant", scales=(1.0,))
    made = make_parameter(ParameterInfo(layout=layout, init=init, decay=decay, partial_over_tensor=partial))
    return made.requires_grad_(not frozen)


class Holder(nn.Module):
    """A layer that is nothing but its parameters."""

    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, value)


class Net(nn.Module):
    """Three linears; no two take the same length in a bucket over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        tp = no_tensor_parallel()
        self.first = ColumnParallelLinear(4, (4,), tp=tp)
        self.second = ColumnParallelLinear(4, (8,), tp=tp)
        self.head = ColumnParallelLinear(8, (8,), tp=tp, decay="head")

    @property
    def layers(self) -> NamedLayers:
        return list(self.named_children())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


NET_ORDER = ["head", "second", "first"]  # in which backward completes the layers


def net_inputs(count: int, seed: int = 0) -> list[Tensor]:
    """Micro-batches."""
    return list(torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(seed)))


def net_loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).sum()


def plain_gradients(values: dict[str, Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Of Net's loss on all inputs, by autograd alone, in torch's own linears."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    for x in inputs:
        for name in ("first", "second"):
            x = nn.functional.linear(x, leaves[f"{name}.weight"], leaves[f"{name}.bias"]).tanh()
        (nn.functional.linear(x, leaves["head.weight"], leaves["head.bias"]) ** 2).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def policy_of(stage: int, *, reduce: str | None = None, unit_bytes: int = 0, **options: object) -> ShardingPolicy:
    """Each layer a unit of its own, unless said otherwise."""
    reduce = reduce or ("micro_batch" if stage >= 2 else "step")
    return ShardingPolicy(stage=stage, reduce=reduce, unit_bytes=unit_bytes, **options)  # type: ignore[arg-type]


def make_store(
    layers: NamedLayers,
    policy: ShardingPolicy | None = None,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype | Callable[[str], torch.dtype] = torch.float32,
    device: torch.device = CPU,
    seed: int = 1,
) -> ParameterStore:
    """A store of one stage, by default of one rank."""
    return ParameterStore(
        [layers],
        grid=grid or make_grid(GridShape()),
        device=device,
        seed=seed,
        policy=policy or policy_of(0),
        dtype_of=dtype if callable(dtype) else lambda _: dtype,
    )


def planned(rank: int = 0, **sizes: int) -> Grid:
    """A grid without process groups."""
    return planned_grid(GridShape(**sizes), rank)


class Arriving(Pending):
    """Something on its way: done when waited for, not before."""

    def __init__(self, result: Tensor, arrive: Callable[[], None]) -> None:
        super().__init__(result)
        self._arrive: Callable[[], None] | None = arrive

    def wait(self) -> Tensor:
        if self._arrive is not None:
            self._arrive, arrive = None, self._arrive
            arrive()
        return self._result


class FakeWire:
    """Stands in for the collectives of a planned grid, as if all ranks held the same as this one.

    Results are written when they are waited for, from what the operands are then. Attributes:
        reduced, gathered: lengths and places of what was sent, in order: (length, data pointer of x).
        waited: of what was gathered, the place `out` of what has arrived.
    """

    def __init__(self) -> None:
        self.reduced: list[tuple[int, int]] = []
        self.gathered: list[int] = []
        self.waited: list[int] = []
        self.on_reduce: Callable[[Tensor], None] = lambda _: None

    def reduce_scatter_into_start(
        self, out: Tensor, x: Tensor, room: Tensor, axis: Axis, *, accumulate: bool = False
    ) -> Pending:
        assert axis.size > 1 and room.shape == x.shape and room.dtype == x.dtype and out.dtype == torch.float32
        assert out.numel() * axis.size == x.numel()
        self.reduced.append((x.numel(), x.data_ptr()))
        self.on_reduce(x)
        room.fill_(float("nan"))

        def arrive() -> None:
            part = x[axis.index * out.numel() : (axis.index + 1) * out.numel()].float() * axis.size
            out.copy_(out + part if accumulate else part)

        return Arriving(out, arrive)

    def all_gather_into_start(self, out: Tensor, x: Tensor, axis: Axis) -> Pending:
        assert out.numel() == x.numel() * axis.size
        self.gathered.append(x.data_ptr())
        out.fill_(float("nan"))

        def arrive() -> None:
            self.waited.append(x.data_ptr())
            out.copy_(x.repeat(axis.size))

        return Arriving(out, arrive)


@contextmanager
def fake_wire() -> Iterator[FakeWire]:
    """Collectives of `parallel.comm` that need no process group."""
    wire = FakeWire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "reduce_scatter_into_start", wire.reduce_scatter_into_start)
        patch.setattr(comm, "all_gather_into_start", wire.all_gather_into_start)
        yield wire


def unit_of(store: ParameterStore, layer: str) -> Unit:
    """The unit that a layer is in."""
    return next(unit for unit in store.units if layer in unit.layers)
