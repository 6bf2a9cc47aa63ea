"""Adafactor as ViTs are trained with it: Zhai et al. 2022 (Scaling Vision Transformers) after Shazeer and Stern 2018.

With G the gradient of a logical matrix [M, N], R [M] and C [N] the moving averages of the row and column sums of
G^2 + 1e-30, the second moment of an element is taken to be R_i C_j / sum(R). The decay of the averages grows as
min(0.999, 1 - t^-0.8). The scaled gradient goes through a first moment that is kept in bf16, so the state is a quarter
of Adam's. No scaling by the parameter's size and no clipping of updates: big_vision's choices.

Each rank sums what it accounts for (`Fragment.own`); all vectors are added up in one all-reduce, kept by every rank,
and applied to what it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.optimizers.base import Constants, GroupOptions, Optimizer, Rates, write_model_weight
from engine.optimizers.chunks import Chunk, chunks, own_chunks
from model.kernels import Kernels
from parallel import comm
from parallel.sharding.exchange import Block, matrix_shapes
from parallel.sharding.fragments import Fragment, Fragments, Group

_MIN_SIZE = 32  # smaller matrices gain little memory by factors
_POWER = 0.8
_BETA2_CAP = 0.999
_EPS = 1e-30


class _Plan(NamedTuple):
    """How a fragment is walked through. shapes: (M, N) of its matrices, none where it is not factored."""

    shapes: list[tuple[int, int]]
    own: list[Chunk]
    trained: list[Chunk]

    @staticmethod
    def of(fragment: Fragment) -> _Plan:
        shapes = matrix_shapes(fragment.info.layout)
        factored = min(min(shape) for shape in shapes) >= _MIN_SIZE
        return _Plan(shapes if factored else [], own_chunks(fragment) if factored else [], chunks(fragment))

    @property
    def length(self) -> int:
        """Elements of R and C of all matrices."""
        return sum(rows + cols for rows, cols in self.shapes)

    def vectors(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(R [M], C [N]) of each matrix in [length], as views."""
        parts = iter(factors.split([side for shape in self.shapes for side in shape]))
        return [(next(parts), next(parts)) for _ in self.shapes]


class Adafactor(Optimizer):
    """Adafactor on fragments. State, for each:

    momentum: bf16 [L], 2 bytes per element.
    factors: fp32, R and C of each of the parameter's matrices, whole on every rank; empty if it is not factored.
    second_moment: fp32 [L] where it is not factored, as some matrix has a side below 32; else empty.
    """

    whole = frozenset({"factors"})

    def __init__(
        self, fragments: Fragments, options: Mapping[Group, GroupOptions], constants: Constants, kernels: Kernels
    ) -> None:
        super().__init__(fragments, options, constants, kernels)
        self.arrays = fragments.fragments
        self._plans = [_Plan.of(f) for f in fragments.fragments]
        weights = [f.weight for f in fragments.fragments]
        # one array, of which the state's tensors are views, so that one all-reduce does for all
        self._factors = torch.zeros(sum(plan.length for plan in self._plans), device=self.device)
        full = [weight[: 0 if plan.shapes else None] for weight, plan in zip(weights, self._plans, strict=True)]
        self.state = {
            "momentum": [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights],
            "factors": self._split(self._factors),
            "second_moment": [torch.zeros_like(weight) for weight in full],
        }

    def _split(self, factors: Tensor) -> list[Tensor]:
        """Each fragment's part of an array laid out as `_factors`."""
        return list(factors.split([plan.length for plan in self._plans]))

    def _step(self, rates: Mapping[Group, Rates], grad_factor: float) -> None:
        beta2 = min(_BETA2_CAP, 1 - self.steps**-_POWER)
        if self._factors.numel():
            sums = comm.all_reduce(self._sums(grad_factor), self.fragments.axis)
            self._factors.mul_(beta2).add_(sums.mul_(1 - beta2).float())
        for i, fragment in enumerate(self.fragments.fragments):
            self._update_fragment(i, rates[fragment.group], grad_factor, beta2)

    def _sums(self, grad_factor: float) -> Tensor:
        """Row and column sums of the squares that this rank accounts for, laid out as `_factors`: fp64, as each may be
        the sum of very many chunks.
        """
        sums = torch.zeros_like(self._factors, dtype=torch.float64)
        for fragment, plan, part in zip(self.fragments.fragments, self._plans, self._split(sums), strict=True):
            vectors = plan.vectors(part)
            for chunk in plan.own:
                squares = fragment.grad[chunk.elements].mul(grad_factor).square_().add_(_EPS)
                for block in chunk.blocks:
                    rows, cols = _of_block(vectors, block)
                    rows.add_(block.of(squares).sum(1))
                    cols.add_(block.of(squares).sum(0))
        return sums

    def _update_fragment(self, index: int, rates: Rates, grad_factor: float, beta2: float) -> None:
        fragment, plan = self.fragments.fragments[index], self._plans[index]
        momentum, factors, second = (self.state[name][index] for name in ("momentum", "factors", "second_moment"))
        scales = [((r / r.sum()).rsqrt_(), c.rsqrt()) for r, c in plan.vectors(factors)]
        beta1 = self.constants.momentum
        for elements, blocks in plan.trained:
            update = fragment.grad[elements].mul(grad_factor)
            if scales:
                _scale_by_factors(update, blocks, scales)
            else:
                moment = second[elements].mul_(beta2).add_(update.square().add_(_EPS).mul_(1 - beta2))
                update.div_(moment.sqrt())
            # the average is applied in fp32 before it is rounded (optax.ema with an accumulator type)
            update.mul_(1 - beta1).add_(momentum[elements].float().mul_(beta1))
            momentum[elements].copy_(update)
            fragment.weight[elements].mul_(rates.keep).sub_(update.mul_(rates.lr))
            write_model_weight(fragment, elements)


def _of_block(vectors: Sequence[tuple[Tensor, Tensor]], block: Block) -> tuple[Tensor, Tensor]:
    """The entries for its rows [rows] and columns [cols]."""
    by_row, by_col = vectors[block.segment]
    return by_row[block.row : block.row + block.rows], by_col[block.col : block.col + block.cols]


def _scale_by_factors(update: Tensor, blocks: Sequence[Block], scales: Sequence[tuple[Tensor, Tensor]]) -> None:
    for block in blocks:
        by_row, by_col = _of_block(scales, block)
        block.of(update).mul_(by_row[:, None]).mul_(by_col)
