"""The optimizer over flat buckets, and clipping."""

from __future__ import annotations

import torch

from engine.config import OptimizerConfig
from parallel.sharding import GradientBuffer


def make_optimizer(config: OptimizerConfig, gradients: GradientBuffer) -> torch.optim.Optimizer:
    """torch's fused AdamW, one parameter group per kind of weight decay: body, head, and none."""
    assert config.head_weight_decay is not None
    decays = {"body": config.weight_decay, "head": config.head_weight_decay, "none": 0.0}
    groups = [
        {
            "params": [b.parameters for b in gradients.buckets if b.kind.decay == name],
            "weight_decay": decay,
            "name": name,
        }
        for name, decay in decays.items()
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of global norm `norm` are multiplied by so that it is at most `limit` (0: no limit)."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


def update(optimizer: torch.optim.Optimizer, *, lr: float, grad_factor: float) -> None:
    """One optimizer step at learning rate `lr`, gradients multiplied by `grad_factor` on the way.

    torch's fused optimizers divide gradients by their `grad_scale` in the same pass (it is how torch.amp unscales),
    which saves clipping a pass of its own.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    scale = None
    if grad_factor != 1:
        scale = torch.full((), 1 / grad_factor, device=optimizer.param_groups[0]["params"][0].device)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.step()
