"""Softmax attention with the mean of its maps over heads, against float64."""

import math

import pytest
import torch
from torch import Tensor

from model.kernels import Kernels, reference
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_close,
    assert_same,
    each_dtype,
    needs_cpu_module,
    randn,
    threads,
)

pytestmark = needs_cpu_module
each_form = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def qkv(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, seed=i, scale=scale) for i in range(3)]


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[2:]).triu(1) > 0, -math.inf)
    rows = scores.softmax(-1)
    return rows @ v, rows.mean(1)


@each_form
@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 2, 3, 5), (2, 3, 25, 16), (1, 12, 197, 64), (2, 1, 100, 80), (1, 2, 64, 136), (1, 1, 2050, 33)],
)
def test_matches_float64(
    causal: bool, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORES", 1 << 16)  # some queries at a time
    inputs = qkv(*shape, dtype=dtype, scale=1.5)
    exact = written_out(*inputs, causal)
    for kernels in (NATIVE, REFERENCE):
        out, rows = kernels.mapped_attention(*inputs, causal=causal)
        assert (out.dtype, rows.dtype) == (dtype, torch.float32) and out.transpose(1, 2).is_contiguous()
        assert_close("output", out, exact[0], 32 if dtype == torch.float32 else 1)  # sums of 2,050 in fp32
        assert_close("map", rows, exact[1], 16)
        if causal:
            assert not rows.triu(1).any()


@each_dtype
def test_strided_inputs(dtype: torch.dtype) -> None:
    """As they come out of a packed projection, and with channels apart."""
    packed = randn(2, 50, 3, 4, 16, dtype=dtype)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    assert_same(NATIVE.mapped_attention(*views), NATIVE.mapped_attention(*(t.contiguous() for t in views)))
    backwards = torch.flip(views[0], (3,))[..., ::2]
    assert_same(NATIVE.mapped_attention(*[backwards] * 3), NATIVE.mapped_attention(*[backwards.contiguous()] * 3))


@each_form
def test_same_bits_with_any_number_of_threads(causal: bool) -> None:
    """Of so few tokens more threads have smaller blocks of queries."""
    inputs, results = qkv(2, 24, 110, 64), []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(NATIVE.mapped_attention(*inputs, causal=causal))
    for other in results[1:]:
        assert_same(results[0], other)


def test_empty_and_meta() -> None:
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        out, rows = NATIVE.mapped_attention(*qkv(*shape))
        assert out.shape == shape and rows.shape == (shape[0], shape[2], shape[2])
    for kernels in (NATIVE, Kernels("auto")):
        out, rows = kernels.mapped_attention(*(t.to("meta") for t in qkv(2, 3, 5, 8)))
        assert out.is_meta and rows.is_meta and out.shape == (2, 3, 5, 8) and rows.shape == (2, 5, 5)


@each_form
def test_scores_of_any_size(causal: bool) -> None:
    """One key takes all; what overflows or is no number spoils the rows of its queries alone."""
    q, k, v = qkv(1, 2, 61, 16, scale=100.0)
    exact = written_out(q, k, v, causal)
    out, rows = NATIVE.mapped_attention(q, k, v, causal=causal)
    assert_close("output", out, exact[0], 64)
    assert_close("map", rows, exact[1], 64)
    for wrong in (math.nan, math.inf):
        q[0, 1, 7, 3] = wrong
        spoiled, of = NATIVE.mapped_attention(q, k, v, causal=causal)
        others = torch.arange(61) != 7
        assert spoiled[0, 1, 7].isnan().all() and of[0, 7, : 8 if causal else 61].isnan().all()
        assert torch.equal(spoiled[:, :, others], out[:, :, others]) and torch.equal(of[:, others], rows[:, others])


def test_refusals() -> None:
    q, k, v = qkv(1, 2, 5, 8)
    with pytest.raises(ValueError, match="no gradient"):
        NATIVE.mapped_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        NATIVE.mapped_attention(q, k, v)
        for name, given in {"q": (q[0], k, v), "k": (q, k[:, :1], v), "v": (q, k, v[..., :4])}.items():
            with pytest.raises(ValueError, match=f"^{name}: .*shape"):
                NATIVE.mapped_attention(*given)
