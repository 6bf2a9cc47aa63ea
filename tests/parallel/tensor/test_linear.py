"""Column- and row-parallel linears against nn.Linear in float64, weight-gradient sinks, and collectives per block."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from model import Build, MicroBatch, ModelConfig
from model.blocks import BLOCKS
from parallel import comm
from parallel.grid import GridShape, make_grid
from parallel.layout import attach_info, info_of
from parallel.process_group import World
from parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    attach_sink,
    linear,
    no_tensor_parallel,
    slice_rows,
)
from tests.distributed import run_ranks

SEGMENTS = (4, 8, 9)  # one of which neither 2 nor 4 ranks share evenly
HEADS = (
    (15, 15, 15, 9),
    (3, 3, 3, 1),
)  # lengths, and what is never cut: 5 heads, which no number of ranks shares evenly
WIDTH = 6


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _materialise(module: nn.Module, full: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Give every parameter this rank's part of full(name, logical shape)."""
    for name, meta in list(module.named_parameters()):
        info = info_of(meta)
        parameter = nn.Parameter(info.layout.local(full(name, info.layout.shape)).clone())
        attach_info(parameter, info)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)


def _reference(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters(), 10):
            parameter.copy_(_random(*parameter.shape, seed=seed))
    return layer


def _close(ours: Tensor | None, theirs: Tensor, what: object) -> None:
    assert ours is not None, what
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")


def _check_grads(ours: nn.Module, theirs: nn.Linear, tp: TensorParallel, what: object) -> None:
    """Each gradient is this rank's part of the logical one, after the sum that `partial_over_tensor` asks for."""
    for name, parameter in ours.named_parameters():
        info, grad = info_of(parameter), parameter.grad
        assert grad is not None
        if info.partial_over_tensor:
            grad = comm.all_reduce(grad.clone(), tp.axis)
        expected = theirs.get_parameter(name).grad
        assert expected is not None
        _close(grad, info.layout.local(expected), (what, name))


def _check_column(
    tp: TensorParallel,
    rows: int,
    bias: bool,
    split_input: bool | None,
    segments: Sequence[int] = SEGMENTS,
    units: Sequence[int] = (),
) -> None:
    what = ("column", tp.size, tp.sequence_parallel, rows, bias, split_input, segments, units)
    theirs = _reference(WIDTH, sum(segments), bias)
    ours = ColumnParallelLinear(WIDTH, segments, tp=tp, units=units, bias=bias, split_input=split_input)
    _materialise(ours, lambda name, _: theirs.get_parameter(name).detach())
    local = info_of(ours.weight).layout.local
    x, weights = _random(rows, WIDTH).requires_grad_(), _random(rows, sum(segments), seed=1)
    y = theirs(x)
    y.backward(weights)

    def part(t: Tensor) -> Tensor:
        return slice_rows(t.detach(), tp) if ours.split_input else t.detach().clone()

    x_local = part(x)
    real = part(torch.ones(rows, 1)).bool()
    x_local = torch.where(real, x_local, float("nan")).requires_grad_()  # padding is never used
    y_local = ours(x_local, ours.gather(x_local, rows))
    _close(y_local, local(y.t()).t(), what)
    y_local.backward(local(weights.t()).t())
    assert x.grad is not None
    _close(x_local.grad, part(x.grad), what)
    _check_grads(ours, theirs, tp, what)


def _check_row(
    tp: TensorParallel,
    rows: int,
    bias: bool,
    split_output: bool | None,
    segments: Sequence[int] = SEGMENTS,
    units: Sequence[int] = (),
) -> None:
    what = ("row", tp.size, tp.sequence_parallel, rows, bias, split_output, segments, units)
    theirs = _reference(sum(segments), WIDTH, bias)
    ours = RowParallelLinear(segments, WIDTH, tp=tp, units=units, bias=bias, split_output=split_output)
    _materialise(ours, lambda name, _: theirs.get_parameter(name).detach())
    local = info_of(ours.weight).layout.local
    x, weights = _random(rows, sum(segments)).requires_grad_(), _random(rows, WIDTH, seed=1)
    y = theirs(x)
    y.backward(weights)
    x_local = local(x.detach()).requires_grad_()
    y_local = ours(x_local)
    if ours.split_output:
        start, stop = (min(edge, rows) for edge in tp.row_range(rows))
        assert y_local.shape[0] == tp.local_rows(rows)
        _close(y_local[: stop - start], y[start:stop], what)
        y_local.backward(slice_rows(weights, tp))
    else:
        _close(y_local, y, what)
        y_local.backward(weights.clone())
    assert x.grad is not None
    _close(x_local.grad, local(x.grad), what)
    _check_grads(ours, theirs, tp, what)


def _check_biases_of_some_segments(tp: TensorParallel) -> None:
    theirs, rows, gap = _reference(WIDTH, sum(HEADS[0]), True), 7, slice(15, 30)
    ours = ColumnParallelLinear(WIDTH, HEADS[0], tp=tp, units=HEADS[1], bias=(True, False, True, True))

    def without_gap(x: Tensor) -> Tensor:
        return torch.cat([x[: gap.start], x[gap.stop :]])

    with torch.no_grad():
        theirs.bias[gap] = 0
    full = {"weight": theirs.weight.detach(), "bias": without_gap(theirs.bias.detach())}
    _materialise(ours, lambda name, shape: full[name].view(shape))
    x, weights, local = _random(rows, WIDTH), _random(rows, sum(HEADS[0]), seed=1), info_of(ours.weight).layout.local
    part = slice_rows(x, tp)
    y, expected = ours(part, ours.gather(part, rows)), theirs(x)
    _close(y, local(expected.t()).t(), "some biases")
    y.backward(local(weights.t()).t())
    expected.backward(weights)
    assert theirs.bias.grad is not None and ours.bias is not None
    _close(ours.bias.grad, info_of(ours.bias).layout.local(without_gap(theirs.bias.grad)), "some biases")


def _check_linears(world: World) -> None:
    axis = make_grid(GridShape(tensor=world.size), world).tensor
    for sequence_parallel, rows, bias in product((True, False), (1, 7, 8), (True, False)):
        tp = TensorParallel(axis=axis, sequence_parallel=sequence_parallel)
        for split in (None, False):
            _check_column(tp, rows, bias, split)
            _check_row(tp, rows, bias, split)
        _check_column(tp, rows, bias, None, *HEADS)
        _check_row(tp, rows, bias, None, *HEADS)
    _check_biases_of_some_segments(tp)


@pytest.mark.parametrize("ranks", [2, 4])
def test_linears_equal_the_whole_linear(ranks: int) -> None:
    run_ranks(ranks, _check_linears)


def test_linears_on_one_rank() -> None:
    tp = TensorParallel(axis=no_tensor_parallel().axis, sequence_parallel=True)
    _check_column(tp, 7, True, None)
    _check_row(tp, 7, True, None)
    _check_biases_of_some_segments(tp)
    assert not tp.axis.meter.calls


class _TwoRanks(TensorParallel):
    size = 2  # type: ignore[assignment]


def test_too_few_features_to_split() -> None:
    with pytest.raises(ValueError, match="1 features or heads cannot be split over 2 tensor-parallel ranks"):
        ColumnParallelLinear(4, (8, 1), tp=_TwoRanks(axis=no_tensor_parallel().axis))
    with pytest.raises(ValueError, match="1 features or heads cannot be split over 2 tensor-parallel ranks"):
        RowParallelLinear((1, 8), 4, tp=_TwoRanks(axis=no_tensor_parallel().axis))
    with pytest.raises(ValueError, match="1 features or heads cannot be split over 2 tensor-parallel ranks"):
        ColumnParallelLinear(4, (8, 8), units=(8, 2), tp=_TwoRanks(axis=no_tensor_parallel().axis))


# -- weight-gradient sinks ---------------------------------------------------------------------------------------------


class _Sink:
    """Keeps products until it is asked for their sum."""

    def __init__(self) -> None:
        self.kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        self.kept.append((parameter, grad_output, x))

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return torch.stack([g.t() @ x for p, g, x in self.kept if p is parameter]).sum(0)


@pytest.mark.parametrize("hooked", [False, True], ids=["kept", "saved elsewhere"])
def test_a_sink_takes_weight_gradients(hooked: bool) -> None:
    """Also where what autograd keeps is saved by another, and comes back as other tensors."""
    column = ColumnParallelLinear(WIDTH, SEGMENTS, tp=no_tensor_parallel())
    row = RowParallelLinear(SEGMENTS, WIDTH, tp=no_tensor_parallel())
    for layer in (column, row):
        _materialise(layer, lambda _, shape: _random(*shape))
    own = nn.Parameter(_random(WIDTH, WIDTH, seed=4))
    parameters = [column.weight, row.weight, own]

    def backward() -> None:
        for seed in (1, 2):  # two micro-batches
            with saved_tensors_hooks(lambda x: x, lambda x: x) if hooked else nullcontext():
                y = linear(row(column(_random(3, WIDTH, seed=seed)).tanh()), own, None)
            (y**2).sum().backward()

    backward()
    expected = [parameter.grad for parameter in parameters]
    biases = [
        layer.bias.grad.clone() for layer in (column, row) if layer.bias is not None and layer.bias.grad is not None
    ]
    for parameter in (*parameters, *column.parameters(), *row.parameters()):
        parameter.grad = None
    sink = _Sink()
    for parameter in parameters:
        attach_sink(parameter, sink)
    backward()
    assert [parameter.grad for parameter in parameters] == [None] * 3
    assert len(sink.kept) == 6
    for parameter, grad in zip(parameters, expected, strict=True):
        assert grad is not None
        _close(sink.gradient(parameter), grad, "sink")
    for layer, bias in zip((column, row), biases, strict=True):
        assert layer.bias is not None
        _close(layer.bias.grad, bias, "bias")  # not a product: autograd's as ever


# -- collectives of a block --------------------------------------------------------------------------------------------


def _traffic_of_blocks(world: World) -> dict[tuple[str, bool], list[tuple[dict[str, int], dict[str, int]]]]:
    """(calls, bytes) of forward, then of backward, of each block with and without sequence parallelism."""
    grid, out = make_grid(GridShape(tensor=world.size), world), {}
    config = ModelConfig(
        width=8, depth=1, num_heads=2, image_size=6, patch_size=2, num_classes=4, pool="map", qk_norm=True
    ).resolve()
    images = torch.zeros(3, 3, 6, 6)
    for kind, sequence_parallel in product(BLOCKS, (True, False)):
        tp = TensorParallel(axis=grid.tensor, sequence_parallel=sequence_parallel)
        block = BLOCKS[kind]("block", 0.0, "full", Build(config=config, tp=tp))
        _materialise(block, lambda _, shape: torch.ones(shape))
        x = slice_rows(torch.randn(27, 8), tp).requires_grad_()
        grid.meter.reset()
        y = block(x, MicroBatch.of_images(images, training=True))
        seen = [(dict(grid.meter.calls), dict(grid.meter.bytes))]
        grid.meter.reset()
        y.sum().backward()
        out[kind, sequence_parallel] = [*seen, (dict(grid.meter.calls), dict(grid.meter.bytes))]
    return out


def test_collectives_per_block() -> None:
    """27 rows of 8 floats: in parts of 14 rows, 28 with the padding."""
    row = 8 * 4
    for found in run_ranks(2, _traffic_of_blocks):
        for kind, times in (("parallel", 1), ("sequential", 2)):
            parts = ({"all_gather": times, "reduce_scatter": times},)
            sizes = ({"all_gather": times * 14 * row, "reduce_scatter": times * 28 * row},)
            assert found[kind, True] == [(*parts, *sizes)] * 2, kind
            assert found[kind, False] == [({"all_reduce": times}, {"all_reduce": times * 27 * row})] * 2, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_computed_alone_have_the_bits_of_the_whole_product_and_of_what_follows(dtype: torch.dtype) -> None:
    """At widths that no vector divides, too: a kernel takes the end of each row by itself, or they would have none."""
    tried = 0
    for rows, width, head, hidden in ((34, 40, 60, 80), (12, 40, 48, 84), (197, 64, 192, 256), (3, 8, 7, 9)):
        made = ColumnParallelLinear(width, (head, hidden), tp=no_tensor_parallel())
        made.to_empty(device="cpu")
        for p in made.parameters():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(2)).to(dtype)
        with torch.no_grad():
            whole = made(x)
            for columns in (slice(0, head), slice(head, head + hidden)):
                if (part := made.part(columns, x)) is not None:
                    tried += 1
                    assert torch.equal(part, whole[:, columns])
                    assert torch.equal(nn.functional.gelu(part), nn.functional.gelu(whole[:, columns]))
    assert tried
