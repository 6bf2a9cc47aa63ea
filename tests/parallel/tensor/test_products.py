"""Products of a linear layer in every format against float64, on every route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.tensor import products
from parallel.tensor.products import (
    attends_through_fp32,
    attention,
    input_gradient,
    linear,
    through_fp32,
    weight_gradient,
)

ROWS, WIDTH, OUT = 37, 24, 19
HALF = (torch.bfloat16, torch.float16)
NATIVE = frozenset({"avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"})
CPU = torch.device("cpu")


@pytest.fixture(params=["through fp32", "as torch does it", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the products are taken, each route of the CPU on any machine."""
    monkeypatch.setattr(products, "_cpu_flags", lambda: NATIVE if "torch" in request.param else frozenset[str]())
    yield torch.device("cuda" if request.param == "cuda" else "cpu")


def rand(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def assert_product(given: Tensor, a: Tensor, b: Tensor, *, shares_in: torch.dtype | None = None) -> None:
    """a b to within the sum's rounding in fp32 (or float64) and one rounding to the result's format, or one of each
    micro-batch's share to `shares_in`.
    """
    a, b = a.double(), b.double()
    exact, size = a @ b, a.abs() @ b.abs()
    sum_eps = torch.finfo(torch.promote_types(given.dtype, torch.float32)).eps
    rounding = torch.finfo(shares_in).eps * size if shares_in else torch.finfo(given.dtype).eps * exact.abs()
    assert ((given.double() - exact).abs() <= 0.51 * rounding + a.shape[1] * sum_eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_each_product_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    x = rand(ROWS, WIDTH, dtype=dtype, device=device, seed=0)
    weight = rand(OUT, WIDTH, dtype=dtype, device=device, seed=1)
    grad = rand(ROWS, OUT, dtype=dtype, device=device, seed=2)
    y, dx, dw = linear(x, weight), input_gradient(grad, weight), weight_gradient(grad, x)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    assert_product(y, x, weight.t())
    assert_product(dx, grad, weight)
    assert_product(dw, grad.t(), x)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_weight_gradient_goes_into_its_place_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    bucket = torch.full((3 * OUT * WIDTH,), float("nan"), device=device)  # what was there before
    out = bucket[OUT * WIDTH : 2 * OUT * WIDTH].view(OUT, WIDTH)
    grads = rand(4, ROWS, OUT, dtype=dtype, device=device, seed=0)
    xs = rand(4, ROWS, WIDTH, dtype=dtype, device=device, seed=1)
    for m, (grad, x) in enumerate(zip(grads, xs, strict=True)):
        given = weight_gradient(grad, x, out, accumulate=m > 0)
        assert given.data_ptr() == out.data_ptr()
    rounds = device == CPU and not through_fp32(dtype, device)
    assert_product(out, grads.flatten(0, 1).t(), xs.flatten(0, 1), shares_in=dtype if rounds else None)
    assert bucket.isnan().sum() == 2 * OUT * WIDTH  # its neighbours are untouched


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_attention_against_float64(dtype: torch.dtype, masked: bool, device: torch.device) -> None:
    """Heads lie after tokens in memory, as the projection leaves them."""
    q, k, v, grad = (rand(2, 7, 3, 8, dtype=dtype, device=device, seed=i).transpose(1, 2) for i in range(4))
    mask = rand(2, 1, 7, 7, dtype=torch.float32, device=device, seed=4) > -0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    scores = (exact[0] @ exact[1].transpose(-1, -2)) / 8**0.5
    wanted = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ exact[2]
    out = attention(*given, mask)
    out.backward(grad)
    wanted.backward(grad.double())
    eps = torch.finfo(dtype).eps
    for a, b in zip([out, *(x.grad for x in given)], [wanted, *(x.grad for x in exact)], strict=True):
        assert a is not None and b is not None and a.dtype == dtype
        assert (a.double() - b).abs().max() <= 8 * eps * b.abs().max()


def test_attention_keeps_no_scores_and_nothing_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cpu_flags", lambda: frozenset[str]())
    for device in (CPU, torch.device("meta")):
        q, k, v = (torch.empty(2, 3, 50, 8, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(3))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):  # type: ignore[misc]
            attention(q, k, v)
        wide = sum(x.numel() for x in kept if x.dtype != torch.bfloat16)
        assert sum(x.numel() for x in kept) - wide == 4 * q.numel()
        assert wide < q.numel()  # log-sum-exps, a number per query


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_few_images_at_a_time(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cpu_flags", lambda: frozenset[str]())
    q, k, v, grad = (rand(7, 3, 5, 8, dtype=torch.bfloat16, device=CPU, seed=i) for i in range(4))
    mask = (rand(7, 1, 5, 5, dtype=torch.float32, device=CPU, seed=4) > 0) | torch.eye(5).bool() if masked else None
    found = []
    for part in (2 * 3 * 5 * 8, 1, 1 << 19):  # two images at a time, one, all
        monkeypatch.setattr(products, "_PART", part)
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*given, mask)
        out.backward(grad)
        found.append([out, *(x.grad for x in given)])
    for other in found[1:]:
        assert all(a is not None and b is not None and a.equal(b) for a, b in zip(found[0], other, strict=True))
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 3, 5, 8)


class Products(TorchDispatchMode):
    """Notes the formats that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            self.seen |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_multiplies_what_its_instructions_can(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_cpu_flags", lambda: NATIVE if native else frozenset({"avx512f", "f16c"}))
    x, weight = rand(4, 8, dtype=dtype, device=CPU, seed=0), rand(6, 8, dtype=dtype, device=CPU, seed=1)
    with Products() as mode:
        grad = linear(x, weight)
        input_gradient(grad, weight)
        weight_gradient(grad, x)
        weight_gradient(grad, x, torch.zeros(6, 8), accumulate=True)
    assert mode.seen == {dtype if native else torch.float32}


def test_only_half_precision_on_a_cpu_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cpu_flags", lambda: frozenset({"avx512_bf16", "amx_bf16"}))
    assert through_fp32(torch.float16, CPU) and not through_fp32(torch.bfloat16, CPU)
    assert attends_through_fp32(torch.float16, CPU) and not attends_through_fp32(torch.bfloat16, CPU)
    monkeypatch.setattr(products, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert attends_through_fp32(torch.bfloat16, CPU) and not through_fp32(torch.bfloat16, CPU)
    for dtype in (torch.float32, torch.float64):
        assert not through_fp32(dtype, CPU) and not attends_through_fp32(dtype, CPU)
    for device in ("cuda", "meta"):
        assert not through_fp32(torch.float16, torch.device(device))
        assert not attends_through_fp32(torch.float16, torch.device(device))


def test_flags_of_this_host_are_words() -> None:
    assert all(flag and " " not in flag for flag in products._cpu_flags())
