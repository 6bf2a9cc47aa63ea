"""Targets of several teachers on one scale: mean and deviation of all that has been seen.

Teachers' activations differ in size by orders of magnitude, so an unscaled sum of losses is the loss of one of them
(Ranzinger et al. 2024, AM-RADIO; PHI-S). Of PHI-S, a rotation after one common scale, we keep the scale: an MSE is the
same under rotations, and a learned projection of the student's absorbs them. Statistics of a micro-batch would be
another loss in each layout; these are sums over all ranks and all steps before, in float64.

Legend: n rows of this rank, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis


class Moments:
    """Count, mean and sum of squares about it of each feature, of all rows of all ranks, of steps that are over.

    Args:
        width: E.
    """

    def __init__(self, width: int) -> None:
        self.values = torch.zeros(2 * width + 1, dtype=torch.float64)
        """[2 E + 1]: count, means, sums of squares about them; the same on all ranks, to be saved."""
        self.noted = torch.zeros_like(self.values)
        """The same of this rank's rows of the step that goes on."""

    @property
    def counts(self) -> Tensor:
        """1 if anything counts, else 0: fp32 []."""
        return (self.values[0] > 0).float()

    @torch.no_grad()
    def note(self, rows: Tensor) -> None:
        """Rows [n, E] of this rank; n may differ. They count once the step is over."""
        if rows.is_meta:  # a plan
            return
        wide = rows.double()
        mean = wide.sum(0) / max(1, len(wide))
        here = torch.cat([wide.new_full((1,), float(len(wide))), mean, (wide - mean).square().sum(0)])
        self.noted = _together(self.noted.to(rows.device), here)

    def standardise(self, rows: Tensor) -> Tensor:
        """Rows [..., E] less the means, over one deviation of all features: of all that counts, the mean of variances
        is 1. Zeros where nothing counts yet. Of fp32 at least.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        if rows.is_meta:
            return rows.to(wide)
        self.values = self.values.to(rows.device)
        count, mean, spread = _parts(self.values)
        scale = (spread.mean() / count.clamp(min=1)).clamp(min=1e-12).rsqrt() * (count > 0)
        return (rows.to(wide) - mean.to(wide)) * scale.to(wide)


@torch.no_grad()
def end_step(moments: Sequence[Moments], axis: Axis, *, counts: bool) -> None:
    """What was noted counts from now on, unless the step does not. Two small reductions: collective, if it does.

    Args:
        axis: the ranks that have rows of their own.
    """
    if moments and counts:
        own = [_parts(of.noted) for of in moments]
        totals = comm.all_reduce(torch.cat([x for n, mean, _ in own for x in (n, n * mean)]), axis)
        sizes = [size for _, mean, _ in own for size in (1, len(mean))]
        found = totals.split(sizes)
        means = [total / n.clamp(min=1) for n, total in zip(found[::2], found[1::2], strict=True)]
        spreads = [spread + n * (mean - at).square() for (n, mean, spread), at in zip(own, means, strict=True)]
        spread = comm.all_reduce(torch.cat(spreads), axis).split(sizes[1::2])
        for of, *step in zip(moments, found[::2], means, spread, strict=True):
            of.values = _together(of.values.to(totals.device), torch.cat(step))
    for of in moments:
        of.noted.zero_()


def _parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count [1], means [E], sums of squares about them [E]."""
    width = len(values) // 2
    return values[:1], values[1 : width + 1], values[width + 1 :]


def _together(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows of both (Chan et al. 1979)."""
    (n, mean, spread), (m, other, spreads) = _parts(a), _parts(b)
    part = m / (n + m).clamp(min=1)
    gap = other - mean
    return torch.cat([n + m, mean + gap * part, spread + spreads + gap.square() * n * part])
