"""The optimizer over flat buckets or this rank's shards of them, and clipping."""

from __future__ import annotations

import torch

from engine.config import OptimizerConfig
from model.kernels import AdamWStep, Kernels
from parallel.sharding import GradientBuffer


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, or the native kernel where there is one: the same state either way.

    The native kernel gives an element the same bits whatever array it lies in, so shards are updated as the whole is.
    """

    def __init__(self, groups: list[dict[str, object]], config: OptimizerConfig, kernels: Kernels) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.kernels = kernels

    def update(self, *, lr: float, grad_factor: float) -> None:
        """One step at learning rate `lr`; gradients are multiplied by `grad_factor` on the way."""
        device = self.param_groups[0]["params"][0].device
        for group in self.param_groups:
            group["lr"] = lr
        if self.kernels.is_native("adamw", device):
            self._native_step(grad_factor)
            return
        # torch's fused optimizers divide gradients by their `grad_scale` in the same pass: it is how torch.amp unscales
        scale = torch.full((), 1 / grad_factor, device=device) if grad_factor != 1 else None
        self.grad_scale = scale
        self.step()

    @torch.no_grad()
    def _native_step(self, grad_factor: float) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                step = AdamWStep(
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(state["step"]),
                    grad_scale=grad_factor,
                )
                with torch.profiler.record_function("vitruvius::adamw"):
                    self.kernels.adamw(weight.data, weight.grad, state["exp_avg"], state["exp_avg_sq"], None, step)


def make_optimizer(config: OptimizerConfig, gradients: GradientBuffer, kernels: Kernels) -> AdamW:
    """One parameter group per kind of weight decay: body, head, and none."""
    assert config.head_weight_decay is not None
    decays = {"body": config.weight_decay, "head": config.head_weight_decay, "none": 0.0}
    groups: list[dict[str, object]] = [
        {
            "params": [b.trained for b in gradients.buckets if b.kind.decay == name],
            "weight_decay": decay,
            "name": name,
        }
        for name, decay in decays.items()
    ]
    return AdamW([group for group in groups if group["params"]], config, kernels)


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of global norm `norm` are multiplied by so that it is at most `limit` (0: no limit)."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
