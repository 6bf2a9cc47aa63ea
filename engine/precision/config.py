"""Number formats: the group `precision` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from engine.precision.scaler import LossScaler


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Of weights, activations and matrix products; what the optimizer updates is fp32. fp16 scales the loss; fp8 is
    for the linears of the blocks, the rest in bf16."""

    high_layers: tuple[Literal["embed", "norms", "head"], ...] = ()
    """Kept in fp32 under the other types: patch embedding, weights of all norms, final norm and head."""

    high_first_blocks: int = 0
    """First blocks kept in higher precision: fp32 under bf16 and fp16, bf16 under fp8."""

    high_last_blocks: int = 0
    """Last blocks kept in higher precision."""

    initial_loss_scale: float = 2.0**16
    """fp16: factor of the loss at the first step."""

    min_loss_scale: float = 1.0
    """fp16: the loss scale falls no further; steps that overflow there count as bad."""

    loss_scale_window: int = 1000
    """fp16: steps without overflow after which the loss scale doubles."""

    hysteresis: int = 2
    """fp16: overflows until the loss scale halves; given back when it grows, as in Megatron-LM."""

    fp8_recipe: Literal["delayed", "current"] = "delayed"
    """fp8: scales from the largest values of the last steps, or of the tensor itself."""

    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """fp8: e4m3 forward and e5m2 for gradients, or e4m3 throughout."""

    fp8_history: int = 1024
    """fp8, delayed: steps whose largest values count."""

    fp8_margin: int = 0
    """fp8: scales are smaller than they could be by this power of two."""

    fp8_backend: Literal["auto", "native", "transformer_engine"] = "auto"
    """fp8: our own products or NVIDIA Transformer Engine's; auto: Transformer Engine's where it is installed and can
    run."""

    cpu_matmul: Literal["auto", "mkl", "onednn"] = "auto"
    """Library for fp32 matrix products on a CPU: auto takes oneDNN on AMD processors, where MKL is slow, else MKL."""

    def __post_init__(self) -> None:
        for name in ("high_first_blocks", "high_last_blocks", "fp8_margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"precision.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.fp8_margin > 32:
            raise ValueError(f"precision.fp8_margin is {self.fp8_margin}: it is a power of two, and at most 32")
        if not 1 <= self.fp8_history <= _MAX_HISTORY:
            raise ValueError(
                f"precision.fp8_history is {self.fp8_history}: it must be 1 or more, {_MAX_HISTORY} at most"
            )
        self.loss_scaler()
        default = {f.name: f.default for f in fields(self)}
        for dtype, prefixes in _ONLY_UNDER.items():
            for name in (n for n in default if n.startswith(prefixes) and getattr(self, n) != default[n]):
                if self.dtype != dtype:
                    raise ValueError(
                        f"precision.{name} {getattr(self, name)} has no effect with precision.dtype {self.dtype}: "
                        f"use dtype {dtype}, or leave it out"
                    )
        if self.fp8_recipe == "current" and self.fp8_history != default["fp8_history"]:
            raise ValueError(
                f"precision.fp8_history {self.fp8_history} has no effect with fp8_recipe current, which looks at the "
                "tensor itself: use delayed, or leave it out"
            )
        if self.dtype == "fp32" and (self.high_layers or self.high_first_blocks or self.high_last_blocks):
            raise ValueError("precision.high_* has no effect with precision.dtype fp32, which is the highest")

    def check_depth(self, depth: int) -> None:
        """Raise ValueError where a model of so many blocks does not have those that are to be kept high."""
        blocks = self.high_first_blocks + self.high_last_blocks
        if blocks == depth and self.dtype == "fp8":
            raise ValueError(
                f"precision.high_first_blocks and high_last_blocks leave none of the {blocks} blocks to fp8: use "
                "fewer, or precision.dtype bf16"
            )
        if blocks > depth:
            raise ValueError(
                f"precision.high_first_blocks and high_last_blocks are {blocks} together, more than the {depth} blocks "
                "of the model: use fewer"
            )

    def loss_scaler(self) -> LossScaler:
        """A new one, as configured (for fp16). Raises ValueError for numbers that cannot be."""
        return LossScaler(
            initial_loss_scale=self.initial_loss_scale,
            min_loss_scale=self.min_loss_scale,
            loss_scale_window=self.loss_scale_window,
            hysteresis=self.hysteresis,
        )


_MAX_HISTORY = 2**16  # 64 times the usual; each matrix keeps so many numbers, thrice
_ONLY_UNDER = {"fp16": ("initial_loss", "min_loss", "loss_scale", "hysteresis"), "fp8": ("fp8_",)}
