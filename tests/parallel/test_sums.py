"""Norms of as many numbers as real models have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.sums import squared_norm


def exact(x: Tensor) -> float:
    return float(x.double().square().sum())


def test_the_norm_of_two_hundred_million_numbers() -> None:
    """Alike and random; a running fp32 sum is 3 % off here, and differs by how the numbers are cut."""
    part = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    many = part.repeat(192)
    expected = 192 * exact(part)
    assert squared_norm([many]).item() == pytest.approx(expected, rel=1e-7)
    cut = [many[:100_000_001], many[100_000_001:150_000_007], many[150_000_007:]]
    assert squared_norm(cut).item() == pytest.approx(expected, rel=1e-7)
    many.fill_(1e-3)
    assert squared_norm([many]).item() == pytest.approx(many.numel() * exact(many[:1]), rel=1e-6)


@pytest.mark.parametrize("sizes", [[0], [1], [5, 0, 4095], [4096], [1025, 8191], [3, 1024 * 7 + 1]])
def test_any_sizes(sizes: list[int]) -> None:
    parts = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    found = squared_norm(parts)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(sum(map(exact, parts)), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_cannot_be_squared_shows(bad: float) -> None:
    x = torch.ones(10_000)
    x[9_999] = bad
    assert not squared_norm([torch.ones(3), x]).isfinite()
