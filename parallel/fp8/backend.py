"""Who casts and multiplies: our own code, or Transformer Engine's kernels. Scales are the same code's for both.

Legend: R rows, D input width, F output width. Each linear has three products: y = x W', dx = g W, dW = g' x.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from parallel.fp8 import transformer_engine as te
from parallel.fp8.matmul import fp8_means, fp8_obstacle, matmul
from parallel.fp8.quantise import Quantised, quantise

Fp8BackendName = Literal["auto", "native", "transformer_engine"]
FP8_BACKENDS = ("auto", "native", "transformer_engine")


class Fp8Backend(Protocol):
    """The cast to 8 bits and the three products of a linear."""

    def quantise(
        self, x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None
    ) -> tuple[Quantised, Tensor]:
        """As parallel.fp8.quantise.quantise."""

    def forward(self, x: Quantised, weight: Quantised, out_dtype: torch.dtype) -> Tensor:
        """y [R, F] from x [R, D] and W [F, D]."""

    def input_gradient(self, grad: Quantised, weight: Quantised, out_dtype: torch.dtype) -> Tensor:
        """dx [R, D] from g [R, F] and W [F, D]."""

    def weight_gradient(self, grad: Quantised, x: Quantised, out_dtype: torch.dtype) -> Tensor:
        """dW [F, D] from g [R, F] and x [R, D]."""

    def describe(self) -> str:
        """For the start-up report."""


class NativeBackend:
    """Plain torch casts and `torch._scaled_mm`; emulated on a CPU. See parallel.fp8.matmul."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def quantise(
        self, x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None
    ) -> tuple[Quantised, Tensor]:
        """As parallel.fp8.quantise.quantise."""
        return quantise(x, scale, dtype, amax)

    def forward(self, x: Quantised, weight: Quantised, out_dtype: torch.dtype) -> Tensor:
        """y [R, F] from x [R, D] and W [F, D]."""
        y = matmul(x.values, weight.values.t(), x.factor, weight.factor, out_dtype, fast=True)
        return _crop(y, x.shape[0], weight.shape[0])

    def input_gradient(self, grad: Quantised, weight: Quantised, out_dtype: torch.dtype) -> Tensor:
        """dx [R, D] from g [R, F] and W [F, D]."""
        dx = matmul(grad.values, weight.transposed().t(), grad.factor, weight.factor, out_dtype)
        return _crop(dx, grad.shape[0], weight.shape[1])

    def weight_gradient(self, grad: Quantised, x: Quantised, out_dtype: torch.dtype) -> Tensor:
        """dW [F, D] from g [R, F] and x [R, D]."""
        dw = matmul(grad.transposed(), x.transposed().t(), grad.factor, x.factor, out_dtype)
        return _crop(dw, grad.shape[1], x.shape[1])

    def describe(self) -> str:
        """For the start-up report."""
        return f"native, {fp8_means(self.device)} on {self.device}"


def _crop(y: Tensor, rows: int, columns: int) -> Tensor:
    """y without padding, contiguous; y itself where it has none."""
    return y[:rows, :columns].contiguous()


def choose_backend(wanted: str, device: torch.device) -> Fp8Backend:
    """The backend for `device`; auto takes Transformer Engine where it is installed and can run, else our own.

    Args:
        wanted: auto, native or transformer_engine.

    Raises:
        ValueError: an unknown name, a device without FP8 products, or Transformer Engine that cannot be had.
    """
    if wanted not in FP8_BACKENDS:
        raise ValueError(f"fp8_backend is {wanted!r}: it must be {', '.join(FP8_BACKENDS)}")
    if device.type == "meta":  # to plan memory, for whichever
        return NativeBackend(device)
    obstacle = fp8_obstacle(device)
    if obstacle:
        raise ValueError(f"fp8_backend {wanted}: {obstacle}")
    if wanted == "native":
        return NativeBackend(device)
    obstacle = te.obstacle(device)
    if obstacle is None:
        return te.TransformerEngineBackend(te.find(), device)
    if wanted == "transformer_engine":
        raise ValueError(
            f"fp8_backend transformer_engine: {obstacle}; or use fp8_backend native, which needs no package"
        )
    return NativeBackend(device)
