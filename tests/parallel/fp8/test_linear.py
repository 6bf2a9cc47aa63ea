"""Linears with 8-bit products: against float64 of the same quantised values, against fp32, and 2 ranks against 1."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from parallel import comm
from parallel.comm import single_axis
from parallel.fp8 import Fp8Products, Fp8Recipe, Fp8Registry, NativeBackend, RowProducts, enable_fp8, quantise_rows
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    attach_sink,
    no_tensor_parallel,
    slice_rows,
)
from tests.distributed import run_ranks

CPU, ALONE = torch.device("cpu"), single_axis("all")
ROWS, WIDTH, FEATURES = 13, 24, 40  # none of which is a multiple of 16


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, D], W [F, D], bias [F], g [R, F]; gradients small, as they are."""
    x, w = _random(ROWS, WIDTH), _random(FEATURES, WIDTH, seed=1) / 5
    return x, w, _random(FEATURES, seed=2), _random(ROWS, FEATURES, seed=3) * 1e-5


def _products(**recipe: object) -> tuple[Fp8Registry, Fp8Products]:
    made = Fp8Recipe(**recipe)  # type: ignore[arg-type]
    registry = Fp8Registry(["a"], recipe=made, backend=NativeBackend(CPU), device=CPU)
    return registry, Fp8Products(registry.states["a"])


def _rounded(t: Tensor, recipe: Fp8Recipe, role: str) -> Tensor:
    """t after a cast to 8 bits and back with current scaling, in float64."""
    dtype = recipe.dtype(role)  # type: ignore[arg-type]
    scale = torch.finfo(dtype).max / t.abs().max()
    return (t * scale).to(dtype).double() * scale.reciprocal().double()


@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_forward_and_backward(kind: str, format: str, scaling: str) -> None:
    recipe = {"format": format, "scaling": scaling}
    registry, products = _products(**recipe)
    x, w, bias, g = _tensors()
    recipe8, alone = registry.recipe, no_tensor_parallel()
    x8, w8, g8 = (_rounded(t, recipe8, role) for t, role in ((x, "input"), (w, "weight"), (g, "grad")))
    exact = {"y": x8 @ w8.t() + bias.double(), "x": g8 @ w8, "w": g8.t() @ x8, "b": g.double().sum(0)}
    plain = {"y": F.linear(x, w, bias), "x": g @ w, "w": g.t() @ x, "b": g.sum(0)}
    for _ in range(2):  # the second step of delayed scaling uses the first's amaxes, which are the same
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        if kind == "column":
            y = products.column(*leaves, alone)
        else:
            y = products.row(*leaves, alone, False)
        y.backward(g)
        ours = {"y": y.detach(), **{name: leaf.grad for name, leaf in zip("xwb", leaves, strict=True)}}
        for name, value in ours.items():
            assert value is not None
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5 * exact[name].abs().max())
            # Each operand is off by half a unit of its last bit: 2^-4 of its value (e4m3), 2^-3 (e5m2), at most; norms
            # of sums of such errors, which point anywhere, are smaller still.
            error = (value - plain[name]).norm() / plain[name].norm()
            assert error < (2.0**-4 if name == "y" or format == "e4m3" else 2.0**-3.5), (name, error)
        registry.finish_step(ALONE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_out(bad: float) -> None:
    x, w, bias, g = _tensors()
    for poisoned in range(3):
        _, products = _products()
        tensors = [t.clone() for t in (x, w, g)]
        tensors[poisoned][2, 3] = bad
        leaves = [tensors[0].requires_grad_(), tensors[1].requires_grad_()]
        y = products.column(leaves[0], leaves[1], bias, no_tensor_parallel())
        assert y.isfinite().all() == (poisoned == 2)
        y.backward(tensors[2])
        assert leaves[0].grad is not None and leaves[1].grad is not None
        assert leaves[0].grad.isfinite().all() == (poisoned == 0)
        assert leaves[1].grad.isfinite().all() == (poisoned == 1)


def test_bf16_activations() -> None:
    _, products = _products()
    x, w, _, g = _tensors()
    leaf, weight = x.bfloat16().requires_grad_(), w.clone().requires_grad_()
    y = products.column(leaf, weight, None, no_tensor_parallel())
    y.backward(g.bfloat16())
    assert leaf.grad is not None and weight.grad is not None
    assert (y.dtype, leaf.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_inputs_are_kept_in_one_byte_and_the_gradient_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, products = _products()
    casts, saved = [], []
    original = NativeBackend.quantise
    monkeypatch.setattr(
        NativeBackend, "quantise", lambda self, x, *a: (casts.append(tuple(x.shape)), original(self, x, *a))[1]
    )
    x, w, bias, g = _tensors()
    leaves = [t.requires_grad_() for t in (x, w, bias)]

    def keep(t: Tensor) -> Tensor:
        saved.append((t.element_size(), t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        first = products.column(*leaves, no_tensor_parallel())
    assert saved == [(1, 16 * 32), (4, 1)]
    second = products.column(*leaves, no_tensor_parallel())
    (first + second).backward(g)
    assert casts == [(ROWS, WIDTH), (FEATURES, WIDTH), (ROWS, WIDTH), *[(ROWS, FEATURES)] * 2]


def test_recomputed_activations_change_nothing() -> None:
    x, w, bias, g = _tensors()
    found = []
    for recompute in (False, True):
        registry, products = _products()
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]

        def forward(*args: Tensor, run: Fp8Products = products) -> Tensor:
            return run.column(args[0].tanh(), args[1], args[2], no_tensor_parallel()).tanh()

        y = checkpoint(forward, *leaves, use_reentrant=False) if recompute else forward(*leaves)
        y.backward(g)
        found.append([y.detach(), *[leaf.grad for leaf in leaves], registry.amaxes])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class _Sink:
    """Keeps products until asked, as a schedule that splits the backward does."""

    def __init__(self) -> None:
        self.kept: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        raise AssertionError("an FP8 linear has no fp32 operands to hand over")

    def add_computed(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        self.kept.append((parameter, product))


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_sink_takes_weight_gradients(kind: str) -> None:
    x, w, _, g = _tensors()
    grads = []
    for with_sink in (False, True):
        _, products = _products()
        weight, sink = nn.Parameter(w.clone()), _Sink()
        if with_sink:
            attach_sink(weight, sink)
        alone = no_tensor_parallel()
        y = products.row(x, weight, None, alone, False) if kind == "row" else products.column(x, weight, None, alone)
        y.backward(g)
        assert (weight.grad is None) == with_sink
        ((parameter, made),) = sink.kept if with_sink else [(weight, lambda p=weight: p.grad)]
        assert parameter is weight
        grads.append(made())
    assert grads[1].dtype == torch.float32 and torch.equal(*grads)


# -- two tensor ranks against one --------------------------------------------------------------------------------------

Trace = dict[tuple[str, int, str], Tensor]


def _one_linear(products: Fp8Products, kind: str, tp: TensorParallel, trace: Trace, step: int) -> None:
    """Forward and backward of this rank's part; in `trace`, what every rank has after gathering."""
    x, w, bias, g = (t * (1 + step) for t in _tensors())
    index, size, split = tp.axis.index, tp.size, tp.splits_rows

    def columns(t: Tensor) -> Tensor:
        return t.chunk(size, dim=-1)[index].clone()

    def gathered(t: Tensor) -> Tensor:
        return torch.cat(comm.gather_objects(t.detach(), tp.axis), dim=-1)

    def whole(t: Tensor) -> Tensor:
        return comm.all_gather_rows(t.detach(), tp.axis)[:ROWS] if split else t.detach()

    if kind == "column":
        leaf = slice_rows(x, tp).clone().requires_grad_()
        weight = w.chunk(size)[index].clone().requires_grad_()
        y = products.column(leaf, weight, columns(bias), tp, whole(leaf) if split else None)
        y.backward(columns(g))
        found = {"y": gathered(y), "x": whole(leaf.grad), "w": gathered(weight.grad.t()).t()}
    else:
        leaf, weight = columns(x).requires_grad_(), columns(w).requires_grad_()
        y = products.row(leaf, weight, bias, tp, split)
        y.backward(slice_rows(g, tp))
        found = {"y": whole(y), "x": gathered(leaf.grad), "w": gathered(weight.grad)}
    trace.update({(kind, step, name): value for name, value in found.items()})


def _run(tp: TensorParallel, scaling: str) -> Trace:
    trace: Trace = {}
    for kind in ("column", "row"):
        registry, products = _products(scaling=scaling, history=2)
        for step in range(3):
            _one_linear(products, kind, tp, trace, step)
            registry.finish_step(tp.axis)
            trace[kind, step, "scales"] = registry.scales.clone()
    return trace


def _rows(tp: TensorParallel) -> Trace:
    """What every rank has after gathering of products with a scale for each row: the same bits whatever the layout."""
    (x, w, bias, _), index, size, split = _tensors(), tp.axis.index, tp.size, tp.splits_rows
    parts, columns = w.chunk(size)[index], [t.chunk(size, dim=-1)[index].contiguous() for t in (x, w, bias)]
    y = RowProducts(1).column(slice_rows(x, tp), parts, columns[2], tp, x if split else None)
    z = RowProducts(0).row(*columns[:2], bias, tp, split)
    whole = comm.all_gather_rows(z, tp.axis)[:ROWS] if split else z
    return {
        ("column", 0, "y"): torch.cat(comm.gather_objects(y, tp.axis), dim=-1), ("row", 0, "y"): whole,
        ("row", 0, "scales"): quantise_rows(columns[0], tp.axis).factor,
    }  # fmt: skip


def _layouts(world: World) -> dict[tuple[str, bool], Trace]:
    axis = make_grid(GridShape(tensor=world.size), world).tensor
    found = {}
    for scaling, sequence in product(("delayed", "current", "rows"), (True, False)):
        tp = TensorParallel(axis=axis, sequence_parallel=sequence)
        found[scaling, sequence] = _rows(tp) if scaling == "rows" else _run(tp, scaling)
    return found


def test_two_tensor_ranks_equal_one() -> None:
    alone = _layouts(World())
    for found in run_ranks(2, _layouts):
        for layout, trace in alone.items():
            for key, expected in trace.items():
                ours = found[layout][key]
                if key[2] == "scales":
                    assert torch.equal(ours, expected), (layout, key)
                else:
                    torch.testing.assert_close(
                        ours, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()),
                        msg=lambda m, where=(layout, key): f"{where}: {m}",
                    )  # fmt: skip


# -- a model's linears -------------------------------------------------------------------------------------------------


def test_enable_gives_each_linear_its_state() -> None:
    tp = no_tensor_parallel()
    layers = nn.ModuleDict({
        "fc1": ColumnParallelLinear(8, (8,), tp=tp),
        "fc2": RowParallelLinear((8,), 8, tp=tp),
        "head": ColumnParallelLinear(8, (8,), tp=tp),
        "norm": nn.LayerNorm(8),
    })  # fmt: skip
    registry = enable_fp8([layers], recipe=Fp8Recipe(), device=CPU, skip=lambda name: name.startswith("head"))
    assert list(registry.states) == ["fc1", "fc2"]
    for name, state in registry.states.items():
        assert isinstance(layers[name].products, Fp8Products) and layers[name].products.state is state
    assert not isinstance(layers["head"].products, Fp8Products)
    assert registry.describe() == (
        "fp8: 2 linear(s), hybrid (e4m3, gradients e5m2), delayed scaling over 1024 steps, margin 0; "
        "native, emulated on cpu"
    )
