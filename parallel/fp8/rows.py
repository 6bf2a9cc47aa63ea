"""8-bit products of linears that are not trained, with a scale for each row: a token of the input, a feature of the
weight.

What comes of a row then follows from that row and the weight alone, not from who else is in its micro-batch, from the
layout, or from earlier steps: there is nothing to remember, to save, or to agree upon over data and context ranks. (The
idea: scales for each token and each output channel; Yao et al. 2022, ZeroQuant.) Only forward, so e4m3 throughout. By
our own products: Transformer Engine has none of this kind.

Legend: R rows, D input width, F output width, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis
from parallel.fp8.matmul import matmul
from parallel.fp8.quantise import Quantised, aligned, largest, quantise
from parallel.fp8.recipe import Fp8Recipe
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from parallel.tensor.rows import TensorParallel, sum_start

_RECIPE = Fp8Recipe(scaling="current", format="e4m3")
_FORMAT = _RECIPE.dtype("input")


def quantise_rows(x: Tensor, split: Axis | None) -> Quantised:
    """x [R, C] in e4m3, each row by its largest absolute value; the factor is [aligned(R), 1], NaN of a row that has a
    NaN or an infinity.

    Args:
        split: ranks that hold other columns of the same rows; None: there are all. Collective over it.
    """
    amax = largest(*torch.aminmax(x.detach(), dim=1, keepdim=True))
    if split is not None:
        amax = comm.all_reduce(amax, split, "max")
    scale = _RECIPE.scale(amax, torch.finfo(_FORMAT).max, torch.ones_like(amax))
    found, _ = quantise(x, scale, _FORMAT, amax)
    padding = found.values.shape[0] - x.shape[0]
    return Quantised(found.values, F.pad(found.factor, (0, 0, 0, padding), value=1.0), found.shape)


class RowProducts:
    """A linear's `Products`, forward alone.

    Args:
        weight_bytes: that its weight takes in 8 bits; 0: it is not kept, but cast for each product, as where weights
            are sharded and must not be held whole.
    """

    def __init__(self, weight_bytes: int) -> None:
        self.weight_bytes = weight_bytes
        self._weight: Quantised | None = None

    def forget_weight(self) -> None:
        """It is, or will be, another one."""
        self._weight = None

    @torch.no_grad()
    def column(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, gathered: Tensor | None = None
    ) -> Tensor:
        """As parallel.tensor.linear.Products."""
        return self._product(x if gathered is None else gathered, weight, bias, None)

    @torch.no_grad()
    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, split: bool) -> Tensor:
        """As parallel.tensor.linear.Products."""
        out = sum_start(self._product(x, weight, None, tp.axis), tp, split).wait()
        return out if bias is None else out.add_(bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, split: Axis | None) -> Tensor:
        assert not weight.requires_grad
        weight8 = quantise_rows(weight, split) if self._weight is None else self._weight
        if self.weight_bytes:
            self._weight = weight8
        x8 = quantise_rows(x, split)
        y = matmul(x8.values, weight8.values.t(), x8.factor, weight8.factor.t(), x.dtype, fast=True)
        y = y[: x.shape[0], : weight.shape[0]].contiguous()
        return y if bias is None else y.add_(bias)


def enable_row_products(modules: Iterable[nn.Module], *, keep_weights: bool, skip: Callable[[str], bool]) -> None:
    """Give column- and row-parallel linears such products, except those whose name is skipped.

    Args:
        keep_weights: whether a weight is cast once and kept.
    """
    for name, layer in (pair for module in modules for pair in module.named_modules()):
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear) and not skip(name):
            layer.products = RowProducts(_bytes(layer.weight) if keep_weights else 0)  # sharded ones are empty here


def _bytes(weight: Tensor) -> int:
    rows, columns = map(aligned, weight.shape)
    return rows * columns + 4 * rows


def row_products(modules: Iterable[nn.Module]) -> Iterator[RowProducts]:
    """Those that linears of these have."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear) and isinstance(layer.products, RowProducts):
            yield layer.products
