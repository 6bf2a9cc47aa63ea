"""Moving activations in and out of tensor-parallel regions.

Activations are rows [R, D]: one row per token of each image of the micro-batch, R = B * S. Under sequence parallelism
(Korthikanti et al. 2022) each of T tensor ranks holds ceil(R / T) consecutive rows outside the linears; the last rank's
surplus rows are padding, whose values are never used and whose gradients are zero. Splitting the rows of the whole
micro-batch rather than the tokens of each image keeps gathers contiguous and lets any token count work: class
tokens and registers need no care.

Each function is one autograd node; the pairs are each other's transposes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.layout import split_range


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """How layers are split over the tensor axis.

    Attributes:
        axis: the tensor axis of the grid.
        sequence_parallel: whether rows are split between the linears (no effect on an axis of one rank).
    """

    axis: Axis
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.axis.size

    @property
    def splits_rows(self) -> bool:
        """Whether activations between the linears are split by rows."""
        return self.sequence_parallel and self.size > 1

    def local_rows(self, rows: int) -> int:
        """Rows of each rank's part of `rows` rows, padding included."""
        return -(-rows // self.size) if self.splits_rows else rows

    def row_range(self, rows: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of `rows` rows; stop may pass `rows`, by the padding."""
        count = self.local_rows(rows)
        start = self.axis.index * count if self.splits_rows else 0
        return start, start + count


def no_tensor_parallel() -> TensorParallel:
    """Layers that are whole on one rank."""
    return TensorParallel(axis=single_axis("tensor"))


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """`x` with zero rows added up to `rows`; `x` itself if none are missing."""
    return x if x.shape[0] == rows else F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - x.shape[0]))


def slice_rows(x: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's rows of `x` [R, ...], padded with zeros; `x` itself where rows are not split. Not differentiable."""
    if not tp.splits_rows:
        return x
    start, stop = tp.row_range(x.shape[0])
    return pad_rows(x[min(start, x.shape[0]) : stop], stop - start)


class _CopyIn(torch.autograd.Function):
    """Identity; the gradient is summed over the axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(grads[0].clone(), ctx.axis), None


class _GatherRows(torch.autograd.Function):
    """All rows from each rank's part, padding cut off; every rank goes on to do the same with them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, rows: int) -> Tensor:
        ctx.tp, ctx.local = tp, x.shape[0]
        return comm.all_gather_rows(x, tp.axis)[:rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        own = slice_rows(grads[0], ctx.tp)
        return own if own.untyped_storage().nbytes() == own.nbytes else own.clone(), None, None  # a view keeps all


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """Enter a tensor-parallel region with an input that all ranks hold: identity forward, all-reduce backward."""
    return x if axis.size == 1 else _CopyIn.apply(x, axis)


def gather_rows(x: Tensor, tp: TensorParallel, rows: int) -> Tensor:
    """Leave sequence parallelism for a part that every rank computes alike: [ceil(R/T), D] -> [R, D].

    Backward takes this rank's slice of the gradient, which is complete on every rank.
    """
    return _GatherRows.apply(x, tp, rows) if tp.splits_rows else x


class _GatherIn(torch.autograd.Function):
    """All rows from each rank's part, for a region in which ranks do different things: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, rows: int) -> Tensor:
        ctx.tp = tp
        return comm.all_gather_rows(x, tp.axis)[:rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        padded = pad_rows(grads[0], ctx.tp.local_rows(grads[0].shape[0]) * ctx.tp.size)
        return comm.reduce_scatter_rows(padded, ctx.tp.axis), None, None


class _SumOut(torch.autograd.Function):
    """Each rank's share summed, to row parts or whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.rows = tp, x.shape[0]
        if tp.splits_rows:
            return comm.reduce_scatter_rows(pad_rows(x, tp.local_rows(ctx.rows) * tp.size), tp.axis)
        return comm.all_reduce(x.clone(), tp.axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.tp.splits_rows:
            return comm.all_gather_rows(grads[0], ctx.tp.axis)[: ctx.rows], None
        return grads[0], None


class _GatherFeatures(torch.autograd.Function):
    """All features from each rank's share; every rank goes on to do the same with them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, features: int) -> Tensor:
        shares = [split_range(features, tp.size, i) for i in range(tp.size)]
        ctx.own = shares[tp.axis.index]
        most = shares[0][1]  # the first ranks have one more
        parts = comm.all_gather_rows(pad_rows(x.t(), most), tp.axis).split(most)
        return torch.cat([part[: stop - start] for part, (start, stop) in zip(parts, shares, strict=True)]).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.own
        return grads[0][:, start:stop].contiguous(), None, None  # a view would keep all of it


def gather_features(x: Tensor, tp: TensorParallel, features: int) -> Tensor:
    """Leave a column-parallel linear for a part that every rank computes alike: [B, F/T] -> [B, F].

    Backward takes this rank's share of the gradient, which is complete on every rank.
    """
    return _GatherFeatures.apply(x, tp, features) if tp.size > 1 else x


def enter(x: Tensor, tp: TensorParallel, rows: int) -> Tensor:
    """All rows [R, D], for a region in which each tensor rank computes a share of a sum; `leave` ends it."""
    return _GatherIn.apply(x, tp, rows) if tp.splits_rows else copy_in(x, tp.axis)


def leave(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of every tensor rank's [R, D]: this rank's rows of it under sequence parallelism, else all."""
    return x if tp.size == 1 else _SumOut.apply(x, tp)


def sum_start(x: Tensor, tp: TensorParallel, to_parts: bool) -> comm.Pending:
    """Start summing over the axis: an output, or the gradient of an input.

    Args:
        x: [R, D], this rank's share of the sum; overwritten where all get it whole. to_parts: whether each rank gets
            its rows of the sum, ceil(R/T), or all.
    """
    if to_parts:
        padded = pad_rows(x, tp.local_rows(x.shape[0]) * tp.size)
        return comm.reduce_scatter_rows_start(padded, tp.axis)
    return comm.all_reduce_start(x, tp.axis)
