"""Targets of several teachers on one scale: mean and deviation of all that has been seen.

Teachers' activations differ in size by orders of magnitude, so an unscaled sum of losses is the loss of one of them
(Ranzinger et al. 2024, AM-RADIO; PHI-S). Of PHI-S, a rotation after one common scale, we keep the scale: an MSE is the
same under rotations, and a learned projection of the student's absorbs them. Statistics of one batch would be another
loss in each layout; these are sums over all ranks, in float64.

Legend: n rows of this rank, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis


class Moments:
    """Count, mean and sum of squares about it of each feature, of all rows of all ranks so far (Chan et al. 1979).

    Args:
        width: E. device: where they are kept.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.values = torch.zeros(2 * width + 1, dtype=torch.float64, device=device)
        """[2 E + 1]: count, means, sums of squares about them; the same on all ranks, to be saved."""
        self._width = width

    @torch.no_grad()
    def add(self, rows: Tensor, axis: Axis) -> None:
        """Rows [n, E] of this rank; n may differ. Collective over the ranks that have rows of their own."""
        count = torch.full((1,), float(rows.shape[0]), dtype=torch.float64, device=rows.device)
        sums = comm.all_reduce(torch.cat([count, rows.double().sum(0)]), axis)
        mean = sums[1:] / sums[0].clamp(min=1)
        squares = comm.all_reduce((rows.double() - mean).square().sum(0), axis)
        before, (seen, means, spread) = self.values.clone(), self.values.split([1, self._width, self._width])
        total = (before[:1] + sums[0]).clamp(min=1)
        gap = mean - before[1 : self._width + 1]
        means += gap * (sums[0] / total)
        spread += squares + gap.square() * (before[0] * sums[0] / total)
        seen += sums[0]

    @torch.no_grad()
    def standardise(self, rows: Tensor) -> Tensor:
        """Rows [n, E] less the means, over one deviation of all features: the mean of variances is 1 of all that was
        seen. Of fp32 at least.
        """
        count, means, spread = self.values.split([1, self._width, self._width])
        scale = (spread.mean() / count.clamp(min=1)).clamp(min=1e-12).rsqrt()
        wide = torch.promote_types(rows.dtype, torch.float32)
        return ((rows.double() - means) * scale).to(wide)
