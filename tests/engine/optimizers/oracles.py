"""The optimizers written out plainly from their papers, or torch's, in float64 on whole logical parameters.

A fused parameter is one parameter per segment here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tests.engine.optimizers.fragmented import (
    CONFIG,
    DECAY_FACTORS,
    GRAD_FACTOR,
    RATES,
    SPECS,
    Spec,
    logical,
    options_of,
)


class Rates(NamedTuple):
    """lr: with the group's scale. decay: the weight is multiplied by 1 - decay."""

    lr: float
    decay: float


Step = Callable[[Tensor, Tensor, Rates], None]  # weight (in place), gradient


def pieces(spec: Spec, value: Tensor) -> list[Tensor]:
    """float64 copies of a parameter's segments."""
    parts = [value] if spec.dim is None else value.split(spec.segments, spec.dim)
    return [part.double().clone() for part in parts]


def trained_by(make_step: Callable[[Spec, Tensor], Step], by_schedule: bool) -> dict[str, Tensor]:
    """What all parameters are after RATES; `make_step(spec, weight)` for each logical one, with a state of its own."""
    found = {}
    for spec in SPECS:
        weights = pieces(spec, logical(SPECS, 0)[spec.name])
        steps = [make_step(spec, weight) for weight in weights]
        scale, decay = options_of(spec)
        for i, (lr, factor) in enumerate(zip(RATES, DECAY_FACTORS, strict=True), 1):
            rates = Rates(lr * scale, (factor if by_schedule else lr) * scale * decay)
            grads = pieces(spec, logical(SPECS, i)[spec.name])
            for step, weight, grad in zip(steps, weights, grads, strict=True):
                step(weight, grad * GRAD_FACTOR, rates)
        found[spec.name] = (torch.cat(weights, spec.dim) if spec.dim is not None else weights[0]).float()
    return found


def torch_step(optimizer: torch.optim.Optimizer) -> Step:
    """A step of torch.optim on its only parameter."""
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]

    def step(weight: Tensor, grad: Tensor, rates: Rates) -> None:
        group["lr"], group["weight_decay"] = rates.lr, rates.decay / rates.lr
        parameter.grad = grad
        optimizer.step()
        weight.copy_(parameter.detach())

    return step


def adamw(spec: Spec, weight: Tensor) -> Step:
    return torch_step(torch.optim.AdamW([weight.clone().requires_grad_()], betas=CONFIG.betas, eps=CONFIG.eps))


def muon(spec: Spec, weight: Tensor) -> Step:
    """torch's iterates in bf16: give it float64 by replacing Tensor.bfloat16."""
    if spec.decay != "body" or weight.dim() != 2:
        return adamw(spec, weight)
    parameter = weight.clone().requires_grad_()
    return torch_step(torch.optim.Muon([parameter], momentum=CONFIG.momentum, adjust_lr_fn="match_rms_adamw"))


def adafactor(spec: Spec, weight: Tensor) -> Step:
    """Shazeer and Stern 2018, algorithm 4, as Zhai et al. 2022 change it."""
    # a whole parameter is factored or not, by the least side of its segments
    sides = [side for part in pieces(spec, logical(SPECS, 0)[spec.name]) for side in part.shape]
    factored = weight.dim() == 2 and min(sides) >= 32
    v = torch.zeros_like(weight)
    r, c = (torch.zeros(weight.shape[i], dtype=torch.float64) for i in (0, 1)) if factored else (v, v)
    m, t = torch.zeros_like(weight), 0

    def step(weight: Tensor, grad: Tensor, rates: Rates) -> None:
        nonlocal t
        t += 1
        beta2 = min(0.999, 1 - t**-0.8)
        square = grad**2 + 1e-30
        if factored:
            r.mul_(beta2).add_((1 - beta2) * square.sum(1))
            c.mul_(beta2).add_((1 - beta2) * square.sum(0))
            v.copy_(torch.outer(r, c) / r.sum())
        else:
            v.mul_(beta2).add_((1 - beta2) * square)
        now = CONFIG.momentum * m + (1 - CONFIG.momentum) * grad / v.sqrt()
        m.copy_(now.bfloat16())
        weight.copy_(weight * (1 - rates.decay) - rates.lr * now)

    return step


def lamb(spec: Spec, weight: Tensor) -> Step:
    """You et al. 2020, algorithm 2, with phi(x) = x."""
    m, v, t = torch.zeros_like(weight), torch.zeros_like(weight), 0
    beta1, beta2 = CONFIG.betas

    def step(weight: Tensor, grad: Tensor, rates: Rates) -> None:
        nonlocal t
        t += 1
        m.mul_(beta1).add_((1 - beta1) * grad)
        v.mul_(beta2).add_((1 - beta2) * grad**2)
        direction = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + CONFIG.eps)
        direction += rates.decay / rates.lr * weight
        ratio = weight.norm() / direction.norm() if spec.decay != "none" else 1.0
        weight -= rates.lr * ratio * direction

    return step


ORACLES = {"adamw": adamw, "adafactor": adafactor, "lamb": lamb, "muon": muon}


def state_bytes(name: str, spec: Spec) -> int:
    """Of one parameter's state on one process."""
    numel = prod(spec.shape)
    parts = [part.shape for part in pieces(spec, torch.empty(spec.shape))]
    if name == "adafactor":
        factored = len(spec.shape) == 2 and min(min(shape) for shape in parts) >= 32
        return 2 * numel + 4 * (sum(sum(shape) for shape in parts) if factored else numel)
    if name == "muon" and spec.decay == "body" and len(spec.shape) == 2:
        return 4 * numel
    return 8 * numel
