"""AdamW over flat arrays: checks, the native call and the plain PyTorch form. Not differentiated, so no torch
operator."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import checks, native


@dataclass(frozen=True, kw_only=True)
class AdamWStep:
    """The numbers of one step, as torch.optim.AdamW means them."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 1
    """Counts from 1: the step being taken."""
    grad_scale: float = 1.0
    """What the gradient is multiplied by first: 1 / loss scale, times the clipping factor."""

    def corrections(self) -> tuple[float, float]:
        """1 - beta1^step and 1 - beta2^step."""
        return 1 - self.betas[0] ** self.step, 1 - self.betas[1] ** self.step


def check(weight: Tensor, grad: Tensor, moment: Tensor, square: Tensor, model_weight: Tensor | None, step: int) -> None:
    """Flat, contiguous, of one length on one device, not overlapping; master weights and moments in fp32."""
    named = {"weight": weight, "grad": grad, "moment": moment, "square": square, "model_weight": model_weight}
    present = {name: checks.tensor(name, t) for name, t in named.items() if name != "model_weight" or t is not None}
    for name, t in present.items():
        if t.dim() != 1 or not t.is_contiguous():
            raise ValueError(f"{name}: expected a flat contiguous array, got {list(t.shape)}, strides {t.stride()}")
        checks.same_shape(name, t, "weight", weight)
        checks.same_device(name, t, "weight", weight)
        if name in ("weight", "moment", "square") and t.dtype != torch.float32:
            raise ValueError(f"{name}: must be fp32, got {t.dtype}")
        checks.in_place(name, t)
        checks.floating(name, t)
    if step < 1:
        raise ValueError(f"step: counts from 1, got {step}")
    _check_overlap(present)


def _check_overlap(arrays: dict[str, Tensor]) -> None:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in arrays.items() if t.numel())
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{second}: shares memory with {first}; the step writes in place into separate arrays")


def native_step(
    weight: Tensor, grad: Tensor, moment: Tensor, square: Tensor, model_weight: Tensor | None, step: AdamWStep
) -> None:
    first, second = step.corrections()
    module, where = native.target(weight)
    module.adamw(
        native.address(weight), *native.pointer(grad), native.address(moment), native.address(square),
        *native.pointer(model_weight), weight.numel(), 1 - step.lr * step.weight_decay, step.lr / first,
        *step.betas, step.eps, second**-0.5, step.grad_scale, where,
    )  # fmt: skip


def reference_step(
    weight: Tensor, grad: Tensor, moment: Tensor, square: Tensor, model_weight: Tensor | None, step: AdamWStep
) -> None:
    first, second = step.corrections()
    wide = grad.to(weight.dtype) * step.grad_scale
    moment.lerp_(wide, 1 - step.betas[0])
    square.mul_(step.betas[1]).addcmul_(wide, wide, value=1 - step.betas[1])
    weight.mul_(1 - step.lr * step.weight_decay)
    weight.addcdiv_(moment, square.sqrt().mul_(second**-0.5).add_(step.eps), value=-step.lr / first)
    if model_weight is not None:
        model_weight.copy_(weight)
