"""AdamW (Loshchilov and Hutter 2019) on flat arrays, by the native kernel or torch's fused one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.optimizers.base import Constants, GroupOptions, Optimizer, Rates, write_model_weight
from model.kernels import AdamWStep, Kernels
from parallel.sharding.fragments import Fragment, Fragments, Group, Span


class AdamW(Optimizer):
    """AdamW on spans. State: two fp32 moments, 8 bytes per element."""

    def __init__(
        self, fragments: Fragments, options: Mapping[Group, GroupOptions], constants: Constants, kernels: Kernels
    ) -> None:
        super().__init__(fragments, options, constants, kernels)
        self.arrays = fragments.spans
        self.state = {
            name: [torch.zeros_like(span.weight) for span in fragments.spans] for name in ("exp_avg", "exp_avg_sq")
        }

    def _step(self, rates: Mapping[Group, Rates], grad_factor: float) -> None:
        for span, moment, square in zip(self.arrays, self.state["exp_avg"], self.state["exp_avg_sq"], strict=True):
            step = adamw_step(rates[span.group], self.constants, self.steps, grad_factor)
            adamw(span, moment, square, step, self.kernels)


def adamw_step(rates: Rates, constants: Constants, step: int, grad_factor: float) -> AdamWStep:
    """The kernel's numbers."""
    return AdamWStep(
        lr=rates.lr,
        betas=constants.betas,
        eps=constants.eps,
        weight_decay=rates.weight_decay,
        step=step,
        grad_scale=grad_factor,
    )


def adamw(array: Span | Fragment, moment: Tensor, square: Tensor, step: AdamWStep, kernels: Kernels) -> None:
    """Update one array. On CUDA, arrays that start at multiples of 16 bytes, as in buckets, go faster."""
    weight, grad = array.weight, array.grad
    if not weight.numel():
        return
    if kernels.fuses("adamw", weight.device):
        kernels.adamw(weight, grad, moment, square, array.model_weight, step)
        return
    # a tenth of the time of the kernels' plain form; torch's fused optimizers *divide* gradients, and write them back
    scale = torch.full((), 1 / step.grad_scale, device=weight.device) if step.grad_scale != 1 else None
    torch._fused_adamw_(
        [weight], [grad], [moment], [square], [], [torch.full((), float(step.step), device=weight.device)],
        lr=step.lr, beta1=step.betas[0], beta2=step.betas[1], weight_decay=step.weight_decay, eps=step.eps,
        amsgrad=False, maximize=False, grad_scale=scale,
    )  # fmt: skip
    write_model_weight(array)
