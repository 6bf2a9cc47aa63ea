"""The cast to 8 bits against a computation by hand in float64, and what becomes of zeros, NaN and infinities."""

import math

import pytest
import torch
from torch import Tensor

from parallel.fp8 import quantise
from parallel.fp8.quantise import aligned, amax_of

# format: (largest number, smallest exponent of a normal number, mantissa bits)
FORMATS = {torch.float8_e4m3fn: (448.0, -6, 3), torch.float8_e5m2: (57344.0, -14, 2)}
each_format = pytest.mark.parametrize("dtype", list(FORMATS), ids=["e4m3", "e5m2"])


def by_hand(value: float, dtype: torch.dtype) -> float:
    """The nearest number of the format, ties to even, saturating."""
    limit, lowest, bits = FORMATS[dtype]
    value = min(max(value, -limit), limit)
    if value == 0:
        return 0.0
    exponent = max(math.frexp(value)[1] - 1, lowest)
    unit = 2.0 ** (exponent - bits)
    return round(value / unit) * unit  # Python rounds ties to even


@each_format
@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**-9])
def test_each_number_is_the_nearest_of_the_format(dtype: torch.dtype, scale: float) -> None:
    limit, lowest, bits = FORMATS[dtype]
    tiny = 2.0 ** (lowest - bits)  # the smallest subnormal number
    edges = [0.0, -0.0, limit, limit * 1.03, limit * 40, -limit * 1e6, 1e30, tiny, tiny / 2, tiny * 0.51, tiny * 1.5]
    edges += [2.0**lowest, 2.0**lowest * 0.97, 1.0, 1.0625, 1.1875, 1.125, -1.3125]
    ordinary = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10
    values = torch.cat([torch.tensor(edges), ordinary, ordinary * tiny]) / scale
    x = torch.cat([values, torch.zeros(-len(values) % 16)]).view(-1, 16).clamp(-3e38, 3e38)
    quantised, amax = quantise(x, torch.tensor([scale]), dtype)
    scaled = (x * scale).flatten().tolist()  # in fp32, which the definition of the cast starts from
    expected = torch.tensor([by_hand(value, dtype) for value in scaled]).view_as(x)
    assert torch.equal(quantised.values[: len(x)].float(), expected)
    assert amax.tolist() == [x.abs().max().item()]
    assert torch.equal(quantised.factor, 1 / torch.tensor([scale]))


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (16, 48), (17, 30), (0, 5)])
def test_padding_is_zero(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantised, amax = quantise(x, torch.ones(1), dtype)
    rows, columns = shape
    assert quantised.shape == shape and quantised.values.shape == (aligned(rows), aligned(columns))
    assert torch.equal(quantised.values[:rows, :columns].float(), x.to(dtype).float())
    whole = quantised.values.float()
    assert whole.abs().sum() == whole[:rows, :columns].abs().sum()
    assert amax.shape == (1,) and amax == (x.abs().max() if x.numel() else 0)
    assert torch.equal(quantised.transposed().float(), whole.t())
    restored = quantised.emptied().restore(quantised.save())
    assert torch.equal(restored.values.float(), whole) and restored.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_scaled_in_fp32_at_least(dtype: torch.dtype) -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    scale = torch.tensor([1.2345])
    quantised, amax = quantise(x, scale, torch.float8_e4m3fn)
    wide = x.double() if dtype == torch.float64 else x.float()
    assert torch.equal(quantised.values.float(), (wide * scale).to(torch.float8_e4m3fn).float())
    assert amax.dtype == torch.float32 and amax == x.abs().max().float()


@each_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_factor(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(16, 16)
    x[3, 5] = bad
    quantised, amax = quantise(x, torch.ones(1), dtype)
    assert amax.item() == math.inf and quantised.factor.isnan().all()
    others = quantised.values.float().flatten()[torch.arange(256) != 3 * 16 + 5]
    assert (others == 1).all()


def test_amax() -> None:
    def of(*values: float) -> float:
        return amax_of(torch.tensor(values)).item()

    assert of(0.0, -0.0) == 0 and of(1, -3) == 3 and of(-1, 2) == 2
    assert of(1, float("nan")) == of(float("nan"), 1) == of(-float("inf")) == math.inf
    known: Tensor = torch.tensor([7.0])
    assert quantise(torch.ones(2, 2), torch.ones(1), torch.float8_e5m2, known)[1] is known
