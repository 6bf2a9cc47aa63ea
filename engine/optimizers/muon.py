"""Muon (Jordan et al. 2024): the momentum of a matrix is orthogonalised before it is subtracted.

With steps of 0.2 sqrt(max(M, N)) times the learning rate (Liu et al. 2025, Muon is scalable for LLM training) an update
has the root mean square of AdamW's, so that AdamW's learning rate and decay serve both.

Matrices are whole only in passing: `parallel.sharding.exchange` brings each to one rank, and the results back.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from engine.optimizers.adamw import adamw, adamw_step
from engine.optimizers.base import Constants, GroupOptions, Optimizer, Rates
from model.kernels import Kernels
from parallel.sharding.exchange import Block, Exchange, Matrix
from parallel.sharding.fragments import Fragment, Fragments, Group
from parallel.sums import squared_norm

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of Jordan's quintic: steepest at 0, and singular values end up near 1
_STEPS = 5
_EPS = 1e-7


class Muon(Optimizer):
    """Muon on matrices of the body, those of fused parameters one by one; AdamW on all else, at the same rates.

    State, for each fragment: momentum, fp32 [L], of the former (4 bytes per element); exp_avg and exp_avg_sq, fp32 [L],
    of the latter; empty where there is none.
    """

    def __init__(
        self, fragments: Fragments, options: Mapping[Group, GroupOptions], constants: Constants, kernels: Kernels
    ) -> None:
        super().__init__(fragments, options, constants, kernels)
        self.arrays = self._fragments = fragments.fragments
        self._is_matrix = [f.group.decay == "body" and len(f.info.layout.shape) == 2 for f in self._fragments]
        self.state = {
            name: [
                torch.zeros_like(f.weight[: None if is_matrix == for_matrices else 0])
                for f, is_matrix in zip(self._fragments, self._is_matrix, strict=True)
            ]
            for name, for_matrices in (("momentum", True), ("exp_avg", False), ("exp_avg_sq", False))
        }
        self._exchange = Exchange(
            fragments,
            [i for i, is_matrix in enumerate(self._is_matrix) if is_matrix],
            cost=_flops,
            # CPUs without bf16 units take longer in bf16, and lose digits for nothing
            dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
        )

    def _step(self, rates: Mapping[Group, Rates], grad_factor: float) -> None:
        beta = self.constants.momentum
        for i, fragment in enumerate(self._fragments):
            if self._is_matrix[i]:
                self.state["momentum"][i].mul_(beta).add_(fragment.grad.mul(grad_factor * (1 - beta)))
            else:
                step = adamw_step(rates[fragment.group], self.constants, self.steps, grad_factor)
                adamw(fragment, self.state["exp_avg"][i], self.state["exp_avg_sq"][i], step, self.kernels)

        def nesterov(index: int, block: Block) -> Tensor:
            grad = block.of(self._fragments[index].grad).mul(grad_factor * (1 - beta))
            return grad.add_(block.of(self.state["momentum"][index]).mul(beta))

        def apply(matrix: Matrix, block: Block, direction: Tensor) -> None:
            fragment = self._fragments[matrix.fragment]
            _move(fragment, block, direction.float(), rates[fragment.group], 0.2 * sqrt(max(matrix.rows, matrix.cols)))

        self._exchange.run(nesterov, orthogonalise, apply)


def _move(fragment: Fragment, block: Block, direction: Tensor, rates: Rates, scale: float) -> None:
    weight = block.of(fragment.weight)
    weight.mul_(rates.keep).sub_(direction.mul(rates.lr * scale))
    if fragment.model_weight is not None:
        block.of(fragment.model_weight).copy_(weight)


def orthogonalise(matrix: Tensor) -> Tensor:
    """About U V' of the matrix's U S V', singular values between 0.7 and 1.2: five Newton-Schulz steps. [M, N]."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # the short side's Gram matrix is the smaller
    x = x / squared_norm([matrix.contiguous()]).sqrt().clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def _flops(rows: int, cols: int) -> float:
    """Of Newton-Schulz, up to a factor."""
    short, long = sorted((rows, cols))
    return short**2 * (2.0 * long + short)
