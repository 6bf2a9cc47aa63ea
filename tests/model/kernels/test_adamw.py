"""AdamW over flat arrays against torch's."""

import pytest
import torch
from torch import Tensor

from model.kernels import AdamWStep, Kernels, adamw
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_same,
    each_dtype,
    needs_cpu_module,
    randn,
    threads,
)

pytestmark = needs_cpu_module


def state(size: int) -> list[Tensor]:
    return [randn(size), torch.zeros(size), torch.zeros(size)]


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
@pytest.mark.parametrize("size", [0, 1, 31, 10007])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}])
def test_follows_torch_in_float64(kernels: Kernels, size: int, options: dict[str, float]) -> None:
    weight, moment, square = state(size)
    exact = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW([exact], lr=0.01, **({"weight_decay": 0.0} | options), foreach=False)
    for step in range(1, 6):
        grad = randn(size, seed=step)
        exact.grad = grad.double()
        optimizer.step()
        kernels.adamw(weight, grad, moment, square, None, AdamWStep(lr=0.01, step=step, **options))
    assert torch.allclose(weight.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    assert torch.allclose(moment.double(), optimizer.state[exact]["exp_avg"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(square.double(), optimizer.state[exact]["exp_avg_sq"], rtol=1e-5, atol=1e-7)


@each_dtype
def test_writes_the_model_weights(dtype: torch.dtype) -> None:
    weight, moment, square = state(777)
    model = torch.empty(777, dtype=dtype)
    NATIVE.adamw(weight, randn(777, dtype=dtype, seed=3), moment, square, model, AdamWStep(lr=0.1))
    assert torch.equal(model, weight.to(dtype))


@each_dtype
def test_gradient_scale(dtype: torch.dtype) -> None:
    one, other = state(100), state(100)
    grad = randn(100, dtype=dtype, seed=3)
    NATIVE.adamw(one[0], grad * 1024, one[1], one[2], None, AdamWStep(lr=0.1, grad_scale=1 / 1024))
    NATIVE.adamw(other[0], grad, other[1], other[2], None, AdamWStep(lr=0.1))
    assert_same(one, other)


def test_same_bits_with_any_number_of_threads() -> None:
    results = []
    for count in (1, 2, 3):
        arrays = state(100_003)
        with threads(count):
            NATIVE.adamw(arrays[0], randn(100_003, seed=4), arrays[1], arrays[2], None, AdamWStep(lr=0.1))
        results.append(arrays)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_nan_stays_in_its_element() -> None:
    weight, moment, square = state(40)
    grad = randn(40, seed=2)
    grad[17] = float("nan")
    NATIVE.adamw(weight, grad, moment, square, None, AdamWStep(lr=0.1))
    assert weight.isnan().nonzero().flatten().tolist() == [17]


def test_bad_arguments_are_named() -> None:
    w, m, s = state(8)
    g = randn(8, seed=1)
    step = AdamWStep(lr=0.1)
    for args, message in (
        ((w.double(), g, m, s, None, step), "weight: must be fp32"),
        ((w, g[:4], m, s, None, step), "grad: shape"),
        ((w, g.long(), m, s, None, step), "grad: dtype"),
        ((w, g, m.half(), s, None, step), "moment: must be fp32"),
        ((w, g, m, randn(16)[::2], None, step), "square: expected a flat contiguous"),
        ((w, g, m, s, w, step), "model_weight: shares memory with weight|weight: shares memory with model_weight"),
        ((w, g, m, m, None, step), "shares memory"),
        ((w, g, m, s, torch.empty(8, device="meta"), step), "model_weight: on device"),
        ((w, g, m, s, None, AdamWStep(lr=0.1, step=0)), "step: counts from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw(*args)
