"""Which 8-bit formats are used for what, and how a tensor's scale follows from its largest absolute value (its amax).

Delayed scaling and its formula are Transformer Engine's (NVIDIA, `DelayedScaling`; Micikevicius et al. 2022, "FP8
formats for deep learning"): a tensor is scaled by what its amax was in the last steps, so nothing has to be known of
it before it is cast. Current scaling looks at the tensor itself first: one more pass and, over tensor ranks, one small
reduction per split tensor, in exchange for a scale that is never out of date.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["input", "weight", "grad"]
ROLES: tuple[Role, ...] = ("input", "weight", "grad")

# Of scales: so that the inverse is a normal fp32 number, too, whatever a GPU does with subnormal ones.
_LARGEST_SCALE = 2.0**126


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How the matrix products of linears are done in 8 bits.

    Raises:
        ValueError: a value that there is not.
    """

    scaling: Literal["delayed", "current"] = "delayed"
    """Scales from the amaxes of the last steps, or from each tensor itself."""

    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: e4m3 (up to 448, 3 mantissa bits) for inputs and weights, e5m2 (up to 57344, 2 bits) for gradients."""

    history: int = 1024
    """Steps whose amaxes are looked back upon (delayed scaling only)."""

    margin: int = 0
    """Scales are divided by 2^margin: headroom for amaxes that grow."""

    algorithm: Literal["max"] = "max"
    """What is taken from the history: its largest value."""

    def __post_init__(self) -> None:
        for name, values in (
            ("scaling", ("delayed", "current")),
            ("format", ("hybrid", "e4m3")),
            ("algorithm", ("max",)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"fp8 {name} is {getattr(self, name)!r}: it must be {' or '.join(values)}")
        if self.history < 1:
            raise ValueError(f"fp8 history is {self.history}: it must be at least 1 step")
        if not 0 <= self.margin <= 32:
            raise ValueError(f"fp8 margin is {self.margin}: it must be from 0 to 32 (a power of two)")

    def dtype(self, role: Role) -> torch.dtype:
        """The 8-bit format of inputs, weights or output gradients."""
        return torch.float8_e5m2 if role == "grad" and self.format == "hybrid" else torch.float8_e4m3fn

    def limits(self, device: torch.device) -> Tensor:
        """The largest number of each role's format, fp32 [3]."""
        return torch.tensor([torch.finfo(self.dtype(role)).max for role in ROLES], device=device)

    def scale(self, amax: Tensor, limit: Tensor | float, last: Tensor) -> Tensor:
        """What a tensor is multiplied by before the cast: (limit / amax) / 2^margin; `last` if amax is 0, inf or NaN.

        Args:
            amax: any shape, fp32. limit: largest number of the format. last: the scale so far.
        """
        scale = (limit / amax / 2**self.margin).clamp(max=_LARGEST_SCALE)
        return torch.where((amax > 0) & amax.isfinite(), scale, last)

    def describe(self) -> str:
        """For the start-up report."""
        formats = "e4m3, gradients e5m2" if self.format == "hybrid" else "e4m3 throughout"
        scales = f"delayed scaling over {self.history} steps" if self.scaling == "delayed" else "current scaling"
        return f"{self.format} ({formats}), {scales}, margin {self.margin}"
