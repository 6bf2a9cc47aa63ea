"""Column- and row-parallel linears (Shoeybi et al. 2019, Megatron-LM), on plain tensors with explicit collectives.

Legend: R rows (B * S tokens), D input width, F output width, T tensor-parallel size. Weights are [F, D] as in torch.

A column-parallel linear followed by a row-parallel one costs, per direction, one all-gather and one reduce-scatter
with sequence parallelism, one all-reduce without. In backward the sum of input gradients travels while the weight
gradient is computed. On one tensor rank both are ordinary linears.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import products
from parallel.tensor.rows import TensorParallel, no_tensor_parallel, sum_start
from parallel.tensor.weight_grad import weight_gradient

_WHOLE = no_tensor_parallel()  # made once: torch.compile cannot make the meter of an axis


def xavier_uniform(fan_in: int, *fan_outs: int) -> Init:
    """Glorot and Bengio 2010, with the fans of each logical matrix that is fused into one."""
    return Init(kind="uniform", scales=tuple(math.sqrt(6 / (fan_in + fan_out)) for fan_out in fan_outs))


_ALIGNED = 64  # bytes: beyond, addresses make no difference to a kernel
_GAP = 64  # numbers between rows that lie apart, which keeps their alignment


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b, the bias added afterwards: MKL's product that starts from a bias takes up to a third longer."""
    y = products.linear(x, weight)
    return y if bias is None else y.add_(bias)


_SAME_BITS = dict[object, bool]()  # what `_same_bits` has found


def _same_bits(x: Tensor, weight: Tensor, columns: slice) -> bool:
    """Whether x times some rows of a weight gives those columns of x W' bit for bit.

    Libraries choose a kernel by shapes, strides and alignment, not by numbers: so it is tried once for each of these,
    with the numbers at hand, and holds from then on.
    """
    if x.is_meta:
        return True
    key = (
        *((t.dtype, t.shape, t.stride(), t.data_ptr() % _ALIGNED, t.device) for t in (x, weight)),
        (columns.start, columns.stop), torch.get_num_threads(), torch.get_float32_matmul_precision(),
    )  # fmt: skip
    if key not in _SAME_BITS:
        _SAME_BITS[key] = torch.equal(products.linear(x, weight)[:, columns], _part(x, weight, columns))
    return _SAME_BITS[key]


def _part(x: Tensor, weight: Tensor, columns: slice) -> Tensor:
    """Columns of x W'; their rows are further apart than they are long."""
    count = columns.stop - columns.start
    y = x.new_empty(len(x), count + _GAP)[:, :count]
    if products.through_fp32(x.dtype, x.device):
        return y.copy_(products.linear(x, weight[columns]))
    return torch.mm(x, weight[columns].t(), out=y)


class _ColumnParallel(torch.autograd.Function):
    """The weight, which outlives the node, is no part of what recomputation decides on: from hooks on what is saved a
    parameter comes back as another tensor, without its sink.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, gathered: Tensor | None
    ) -> Tensor:
        full = x if gathered is None else gathered
        ctx.save_for_backward(full)
        ctx.weight, ctx.tp, ctx.split = weight, tp, gathered is not None
        return _affine(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (full,), weight = ctx.saved_tensors, ctx.weight
        (grad,) = grads
        pending = None
        if ctx.needs_input_grad[0]:
            pending = sum_start(products.input_gradient(grad, weight), ctx.tp, ctx.split)
        grad_weight = weight_gradient(weight, grad, full) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return pending.wait() if pending else None, grad_weight, grad_bias, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, split: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.tp, ctx.split = weight, tp, split
        if tp.size == 1:
            return _affine(x, weight, bias)
        out = sum_start(products.linear(x, weight), tp, split).wait()
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        (grad,) = grads
        full = comm.all_gather_rows(grad, ctx.tp.axis)[: x.shape[0]] if ctx.split else grad
        grad_x = products.input_gradient(full, weight) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(weight, full, x) if ctx.needs_input_grad[1] else None
        # With split rows each rank sums its own rows only: the bias is marked partial_over_tensor.
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


class Products(Protocol):
    """Who computes the three products of a parallel linear, and moves what they need."""

    def column(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, gathered: Tensor | None = None
    ) -> Tensor:
        """As ColumnParallelLinear: [ceil(R/T), D] (row parts, with all rows beside them) or [R, D] -> [R, F/T]."""

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, split: bool) -> Tensor:
        """As RowParallelLinear: [R, D/T] -> [ceil(R/T), F] (row parts: split) or [R, F]."""


class PlainProducts:
    """In the operands' format."""

    def column(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, gathered: Tensor | None = None
    ) -> Tensor:
        """As Products."""
        y: Tensor = _ColumnParallel.apply(x, weight, bias, tp, gathered)
        return y

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, split: bool) -> Tensor:
        """As Products."""
        y: Tensor = _RowParallel.apply(x, weight, bias, tp, split)
        return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W' + b on one rank, its weight gradient taken by `weight_gradient`. [R, D] -> [R, F]."""
    y: Tensor = _ColumnParallel.apply(x, weight, bias, _WHOLE, None)
    return y


def _split(
    shape: tuple[int, ...], dim: int, segments: Sequence[int], units: Sequence[int], tp: TensorParallel
) -> TensorLayout:
    units = tuple(units) or (1,) * len(segments)
    fewest = min(segment // unit for segment, unit in zip(segments, units, strict=True))
    if fewest < tp.size:
        raise ValueError(f"{fewest} features or heads cannot be split over {tp.size} tensor-parallel ranks")
    return TensorLayout(
        shape=shape, dim=dim, segments=tuple(segments), units=units, parts=tp.size, index=tp.axis.index
    )  # fmt: skip


def sharded_bias(
    segments: Sequence[int], tp: TensorParallel, value: float = 0.0, units: Sequence[int] = ()
) -> nn.Parameter:
    """A bias [F/T] of features that are split over the tensor axis segment by segment."""
    layout = _split((sum(segments),), 0, segments, units, tp)
    return make_parameter(ParameterInfo(layout=layout, init=Init(kind="constant", scales=(value,))))


class ColumnParallelLinear(nn.Module):
    """y = x W' + b with the output features split over the tensor axis, segment by segment.

    Args:
        in_features: D.
        segments: logical output features of each matrix fused into one, e.g. (D, D, D, M) for q, k, v and fc1; each is
            split by itself.
        units: per segment, what is never cut, e.g. the features of a head (default 1).
        tp: the tensor axis. init: initial weights (default Xavier uniform per segment).
        bias: whether there is one, or of which segments. bias_init: its initial value.
        split_input: whether x comes in row parts (the default under sequence parallelism) or whole.
        decay: weight-decay group of the weight.

    Raises:
        ValueError: a segment has fewer features than there are ranks.
    """

    def __init__(
        self,
        in_features: int,
        segments: Sequence[int],
        *,
        tp: TensorParallel,
        units: Sequence[int] = (),
        bias: bool | Sequence[bool] = True,
        init: Init | None = None,
        bias_init: float = 0.0,
        split_input: bool | None = None,
        decay: str = "body",
    ) -> None:
        super().__init__()
        self.tp = tp
        self.split_input = tp.splits_rows if split_input is None else split_input and tp.splits_rows
        layout = _split((sum(segments), in_features), 0, segments, units, tp)
        init = init or xavier_uniform(in_features, *segments)
        self.weight = make_parameter(ParameterInfo(layout=layout, init=init, decay=decay))
        biased = [bias] * len(segments) if isinstance(bias, bool) else list(bias)
        units = tuple(units) or (1,) * len(segments)
        kept = [of for *of, has in zip(segments, units, biased, strict=True) if has]
        self.bias = sharded_bias([s for s, _ in kept], tp, bias_init, [u for _, u in kept]) if kept else None
        self._biased = [(piece.length, has) for piece, has in zip(layout.pieces, biased, strict=True)]
        self.products: Products = PlainProducts()

    def gather(self, x: Tensor, rows: int) -> Tensor | None:
        """All R rows [R, D] of row parts [ceil(R/T), D], for `forward`; None where x comes whole. Not differentiable:
        `forward` is as a function of the parts.
        """
        return comm.all_gather_rows(x.detach(), self.tp.axis)[:rows] if self.split_input else None

    def forward(self, x: Tensor, gathered: Tensor | None = None, *, add_bias: bool = True) -> Tensor:
        """[ceil(R/T), D] (row parts) or [R, D] -> [R, F/T].

        Args:
            gathered: where x comes in row parts, all rows.
            add_bias: False leaves the bias to the caller, who fuses it with what comes next.
        """
        assert (gathered is not None) == self.split_input, "row parts come with all rows, whole rows alone"
        return self.products.column(x, self.weight, self._bias() if add_bias else None, self.tp, gathered)

    def part(
        self, columns: slice, x: Tensor, gathered: Tensor | None = None, *, add_bias: bool = True
    ) -> Tensor | None:
        """Those columns of what `forward` gives, not differentiable; None if it must be computed whole: where libraries
        add up in another order for so many columns, the bits would be others.

        As columns of the whole they do not fill their rows: kernels that go over them take the ends of rows by
        themselves, and add up or round there as they did before.
        """
        rows = x if gathered is None else gathered
        if not isinstance(self.products, PlainProducts) or not _same_bits(rows, self.weight, columns):
            return None
        y, bias = _part(rows, self.weight, columns), self._bias() if add_bias else None
        return y if bias is None else y.add_(bias[columns])

    def _bias(self) -> Tensor | None:
        """[F/T], zero for segments that have none."""
        if self.bias is None or all(has for _, has in self._biased):
            return self.bias
        parts = iter(self.bias.split([length for length, has in self._biased if has]))
        return torch.cat([next(parts) if has else self.bias.new_zeros(length) for length, has in self._biased])


class RowParallelLinear(nn.Module):
    """y = x W' + b with the input features split over the tensor axis, segment by segment.

    Args:
        segments: logical input features of each part of x, e.g. (D, M) for [attention, mlp] beside each other.
        out_features: F.
        split_output: whether y goes out in row parts (the default under sequence parallelism) or whole.
        Others as in ColumnParallelLinear.
    """

    def __init__(
        self,
        segments: Sequence[int],
        out_features: int,
        *,
        tp: TensorParallel,
        units: Sequence[int] = (),
        bias: bool = True,
        init: Init | None = None,
        split_output: bool | None = None,
        decay: str = "body",
    ) -> None:
        super().__init__()
        self.tp = tp
        self.split_output = tp.splits_rows if split_output is None else split_output and tp.splits_rows
        layout = _split((out_features, sum(segments)), 1, segments, units, tp)
        scales = tuple(math.sqrt(6 / (segment + out_features)) for segment in segments)
        init = init or Init(kind="uniform", scales=scales)
        self.weight = make_parameter(ParameterInfo(layout=layout, init=init, decay=decay))
        self.products: Products = PlainProducts()
        self.bias: nn.Parameter | None = None
        if bias:
            info = ParameterInfo(
                layout=TensorLayout(shape=(out_features,)),
                init=Init(kind="constant", scales=(0.0,)),
                partial_over_tensor=self.split_output,
            )
            self.bias = make_parameter(info)

    def forward(self, x: Tensor) -> Tensor:
        """[R, D/T] -> [ceil(R/T), F] (row parts) or [R, F]."""
        return self.products.row(x, self.weight, self.bias, self.tp, self.split_output)
