"""LAMB (You et al. 2020): Adam whose step on each logical matrix is as long as the learning rate times its norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.optimizers.base import Constants, GroupOptions, Optimizer, Rates, write_model_weight
from engine.optimizers.chunks import chunks, own_chunks
from model.kernels import Kernels
from parallel import comm
from parallel.sharding.exchange import matrix_shapes
from parallel.sharding.fragments import Fragments, Group


class Lamb(Optimizer):
    """LAMB on fragments. State: two fp32 moments, 8 bytes per element.

    The trust ratio |w| / |direction| is taken per logical parameter, of fused ones per segment. It is 1 where a norm is
    0, and for the group `none` (biases, norms), as is customary. The direction is computed twice, before and after
    norms are added up over the ranks, rather than kept.
    """

    def __init__(
        self, fragments: Fragments, options: Mapping[Group, GroupOptions], constants: Constants, kernels: Kernels
    ) -> None:
        super().__init__(fragments, options, constants, kernels)
        self.arrays = fragments.fragments
        self.state = {name: [torch.zeros_like(f.weight) for f in self.arrays] for name in ("exp_avg", "exp_avg_sq")}
        self._trained = [chunks(f) for f in fragments.fragments]
        self._own = [own_chunks(f) for f in fragments.fragments]
        # matrices that have a trust ratio, of each fragment
        self._counts = [
            0 if f.group.decay == "none" else len(matrix_shapes(f.info.layout)) for f in fragments.fragments
        ]

    def _step(self, rates: Mapping[Group, Rates], grad_factor: float) -> None:
        for i, fragment in enumerate(self.arrays):
            for elements, _ in self._trained[i]:
                self._update_moments(i, fragment.grad[elements].mul(grad_factor), elements)
        ratios = self._trust_ratios(rates)
        for i, fragment in enumerate(self.arrays):
            group_rates = rates[fragment.group]
            for elements, blocks in self._trained[i]:
                direction = self._direction(i, elements, group_rates.weight_decay)
                for block in blocks if self._counts[i] else ():
                    block.of(direction).mul_(ratios[i][block.segment])
                fragment.weight[elements].sub_(direction.mul_(group_rates.lr))
                write_model_weight(fragment, elements)

    def _update_moments(self, index: int, grad: Tensor, elements: slice) -> None:
        beta1, beta2 = self.constants.betas
        self.state["exp_avg"][index][elements].mul_(beta1).add_(grad * (1 - beta1))
        self.state["exp_avg_sq"][index][elements].mul_(beta2).add_(grad.square_().mul_(1 - beta2))

    def _direction(self, index: int, elements: slice, weight_decay: float) -> Tensor:
        """Adam's direction and weight_decay times the weight, a copy."""
        first, second = (1 - beta**self.steps for beta in self.constants.betas)
        root = self.state["exp_avg_sq"][index][elements].div(second).sqrt_().add_(self.constants.eps)
        direction = self.state["exp_avg"][index][elements].div(first).div_(root)
        return direction.add_(self.arrays[index].weight[elements] * weight_decay) if weight_decay else direction

    def _trust_ratios(self, rates: Mapping[Group, Rates]) -> list[Tensor]:
        """For each fragment, the ratios of its matrices (none if it has none)."""
        squares = torch.zeros(2, sum(self._counts), dtype=torch.float64, device=self.device)  # of very many chunks
        for i, part in enumerate(squares.split(self._counts, dim=1)):
            fragment = self.arrays[i]
            for elements, blocks in self._own[i] if self._counts[i] else ():
                weight = fragment.weight[elements].square()
                direction = self._direction(i, elements, rates[fragment.group].weight_decay).square_()
                for block in blocks:
                    part[0, block.segment] += block.of(weight).sum()
                    part[1, block.segment] += block.of(direction).sum()
        if squares.numel():
            squares = comm.all_reduce(squares, self.fragments.axis)
        weight, direction = squares.sqrt_()
        ratio = torch.where((weight > 0) & (direction > 0), weight / direction, 1.0).float()
        return list(ratio.split(self._counts))
