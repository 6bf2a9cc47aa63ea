"""From fp32, bf16 or fp16 to 8 bits with one scale per tensor.

Legend: x is [R, C]; 8-bit matrices are padded with zeros to multiples of 16 both ways, which the matrix units ask for.

Passes over x: one for its amax; one that scales, one that clamps, one that casts (the cast's behaviour beyond the
largest number has changed between torch versions, so nothing is left to it). A NaN or infinity must not vanish by
clamping: it makes the *factor* by which products are multiplied afterwards NaN, at the price of a few scalar
operations. So the whole product turns NaN, not the rows concerned only: the step is skipped either way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGN = 16


def aligned(size: int) -> int:
    """`size` rounded up to what FP8 matrix units take; at least one unit."""
    return max(-(-size // ALIGN), 1) * ALIGN


def amax_of(x: Tensor) -> Tensor:
    """Largest absolute value, fp32 [1]; infinity where x has a NaN or an infinity, 0 where x is empty."""
    if x.numel() == 0:
        return torch.zeros(1, device=x.device)
    return largest(*torch.aminmax(x.detach())).view(1)  # one pass; NaN goes through


def largest(low: Tensor, high: Tensor) -> Tensor:
    """Absolute value of numbers from `low` to `high`, fp32; infinity where these are NaN or infinite."""
    # A number, not NaN: maxima over ranks and steps are then what one expects of them.
    return torch.maximum(-low, high).float().nan_to_num(nan=float("inf"), posinf=float("inf"))


def dequantisation_factor(scale: Tensor, amax: Tensor) -> Tensor:
    """1 / scale, but NaN where amax is not finite: fp32 [1]."""
    return scale.reciprocal() + amax * 0


@dataclass
class Quantised:
    """An 8-bit matrix: x is about values * factor.

    Attributes:
        values: [aligned(R), aligned(C)], row-major, e4m3 or e5m2. factor: fp32 [1]; of a scale for each row
            [aligned(R), 1].
        shape: (R, C), without the padding.
    """

    values: Tensor
    factor: Tensor
    shape: tuple[int, int]
    _transposed: Tensor | None = field(default=None, repr=False)

    def transposed(self) -> Tensor:
        """values' as a row-major matrix of its own; kept, since a weight's is asked for by each micro-batch."""
        if self._transposed is None:
            self._transposed = self.values.t().contiguous()
        return self._transposed

    def save(self) -> tuple[Tensor | None, ...]:
        """The tensors that autograd keeps for the backward pass."""
        return self.values, self.factor

    def restore(self, saved: tuple[Tensor | None, ...]) -> Quantised:
        """The matrix again, from what `save` gave."""
        values, factor = saved
        assert values is not None and factor is not None
        return Quantised(values, factor, self.shape)

    def emptied(self) -> Quantised:
        """What `restore` can be called on, without the tensors."""
        nothing = self.factor.new_empty(0)
        return Quantised(nothing, nothing, self.shape)


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> tuple[Quantised, Tensor]:
    """Cast clamp(x * scale) to 8 bits.

    Args:
        x: [R, C]. scale: fp32 [1], or of each row [R, 1] (then with amax). dtype: torch.float8_e4m3fn or
            torch.float8_e5m2. amax: that of x (or of the tensor that x is a part of), if it is known already.

    Returns:
        The 8-bit matrix, and amax: fp32 of the shape of scale, infinity where x has a NaN or an infinity.
    """
    rows, columns = x.shape
    amax = amax_of(x) if amax is None else amax
    limit = torch.finfo(dtype).max
    scaled = (x.detach() * scale).clamp_(-limit, limit)  # in fp32 also where x is bf16: scale has a dimension
    padded = (aligned(rows), aligned(columns))
    if padded == (rows, columns):
        values = scaled.to(dtype)
    else:
        values = torch.zeros(padded, dtype=torch.uint8, device=x.device).view(dtype)  # zero bits are the number zero
        values[:rows, :columns].copy_(scaled)
    return Quantised(values, dequantisation_factor(scale, amax), (rows, columns)), amax
