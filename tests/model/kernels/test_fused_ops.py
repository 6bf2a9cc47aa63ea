"""bias + GELU, QK norm, patch merge: against float64, and what each promises beside its value."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels import Kernels, bias_gelu, patch_merge, qk_norm
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_close,
    assert_same,
    check_against_float64,
    each_dtype,
    gradients,
    needs_cpu_module,
    randn,
    threads,
)

pytestmark = needs_cpu_module
Case = Callable[[Kernels], Callable[..., Tensor]]


def gelu(approximate: str) -> Case:
    return lambda kernels: lambda x, bias: kernels.bias_gelu(x, bias, approximate=approximate)


def gelu_beside(kernels: Kernels) -> Callable[..., Tensor]:
    """To the right of a tensor that has a gradient, too."""
    return lambda x, bias: kernels.bias_gelu(x, bias, beside=-x[..., :24])


def qk(heads: int, rms: bool = False) -> Case:
    """q, k, v side by side, so that one gradient reaches all three."""
    return lambda kernels: lambda packed, a, b: torch.cat(kernels.qk_norm(packed, heads, a, b, rms=rms), dim=-1)


def merge(kernels: Kernels) -> Callable[..., Tensor]:
    return kernels.patch_merge


CASES: dict[str, tuple[Case, Callable[[torch.dtype], list[Tensor]]]] = {
    "gelu": (gelu("none"), lambda t: [randn(130, 67, dtype=t), randn(67, seed=1)]),
    "gelu_tanh": (gelu("tanh"), lambda t: [randn(130, 67, dtype=t), randn(67, seed=1)]),
    "gelu_quick": (gelu("quick"), lambda t: [randn(130, 67, dtype=t), randn(67, seed=1)]),
    "gelu_beside": (gelu_beside, lambda t: [randn(130, 67, dtype=t), randn(67, seed=1)]),
    "gelu_beside_aligned": (gelu_beside, lambda t: [randn(2, 65, 64, dtype=t), randn(64, seed=1)]),
    "qk_norm": (qk(3), lambda t: [randn(4, 50, 3 * 3 * 20, dtype=t), randn(20, seed=1), randn(20, seed=2)]),
    "qk_rms_norm": (qk(2, rms=True), lambda t: [randn(70, 3 * 2 * 64, dtype=t), randn(64, seed=1), randn(64, seed=2)]),
    "patch_merge": (merge, lambda t: [randn(3, 10, 14, 19, dtype=t), randn(76, seed=1), randn(76, seed=2)]),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
@each_dtype
def test_matches_float64(case: str, dtype: torch.dtype) -> None:
    op, inputs = CASES[case]
    check_against_float64(op, inputs(dtype), ulps=8 if dtype == torch.float32 else 1)


@each_case
@each_dtype
def test_same_bits_with_any_number_of_threads(case: str, dtype: torch.dtype) -> None:
    op, make = CASES[case]
    inputs = make(dtype)
    inputs[0] = torch.cat([inputs[0]] * 8)
    out = op(NATIVE)(*inputs)
    grad = randn(*out.shape, dtype=dtype, seed=5)
    results = []
    for count in (1, 2, 2, 3):
        with threads(count):
            got, grads = gradients(op(NATIVE), inputs, grad)
            results.append([got, *grads])
    for other in results[1:]:
        assert_same(results[0], other)


@each_case
def test_without_parameters(case: str) -> None:
    op, make = CASES[case]
    x, *rest = make(torch.float32)
    check_against_float64(op, [x, *[None] * len(rest)], ulps=8)


@each_case
@each_dtype
def test_strided_inputs(case: str, dtype: torch.dtype) -> None:
    op, make = CASES[case]
    x, *rest = make(dtype)
    wide = torch.cat([x, x + 1, x], dim=-1)
    for view in (wide[..., x.shape[-1] : 2 * x.shape[-1]], wide[..., ::3]):
        out = op(NATIVE)(view.contiguous(), *rest)
        grad = randn(*out.shape, 2, dtype=dtype, seed=5)[..., 0]
        got, got_grads = gradients(op(NATIVE), [view, *rest], grad)
        dense, dense_grads = gradients(op(NATIVE), [view.contiguous(), *rest], grad.contiguous())
        assert_same([got, *got_grads], [dense, *dense_grads])


@each_case
def test_empty_batch(case: str) -> None:
    op, make = CASES[case]
    x, *rest = make(torch.float32)
    x = x[:0]
    out = op(NATIVE)(x, *rest)
    _, grads = gradients(op(NATIVE), [x, *rest], torch.empty_like(out))
    assert out.shape == op(REFERENCE)(x, *rest).shape
    for g, p in zip(grads[1:], rest, strict=True):
        assert torch.equal(g, torch.zeros_like(p))


@each_case
@each_dtype
def test_nan_stays_where_it_is(case: str, dtype: torch.dtype) -> None:
    op, make = CASES[case]
    inputs = make(dtype)
    inputs[0].view(-1)[5] = float("nan")
    got, expected = op(NATIVE)(*inputs).isnan(), op(REFERENCE)(*[t.double() for t in inputs]).isnan()
    assert torch.equal(got, expected)


@each_case
def test_compiles_without_graph_break(case: str) -> None:
    torch._dynamo.reset()
    op, make = CASES[case]
    inputs = make(torch.float32)
    grad = randn(*op(NATIVE)(*inputs).shape, seed=4)
    got, got_grads = gradients(torch.compile(op(NATIVE), backend="aot_eager", fullgraph=True), inputs, grad)
    eager, eager_grads = gradients(op(NATIVE), inputs, grad)
    assert_same([got, *got_grads], [eager, *eager_grads])


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_gelu_over_its_whole_range(approximate: str) -> None:
    """Value and slope from the far tails through zero: relative in the value where it is not tiny, absolute in the
    slope."""
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e15, -1e15])])
    op = gelu(approximate)
    got, (slope,) = gradients(op(NATIVE), [x, None], torch.ones_like(x))
    exact, (exact_slope,) = gradients(op(REFERENCE), [x.double(), None], torch.ones_like(x).double())
    assert torch.allclose(got.double(), exact, rtol=2e-6, atol=2e-7)
    assert_close("slope", slope, exact_slope, ulps=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qk_norm_in_place(dtype: torch.dtype) -> None:
    packed, a, b = randn(6, 5, 2 * 3 * 16, dtype=dtype), randn(16, seed=1), randn(16, seed=2)
    expected = NATIVE.qk_norm(packed, 2, a, b)
    for kernels in (NATIVE, REFERENCE):
        wide = torch.cat([packed, packed], dim=-1)
        target = wide[..., : packed.shape[-1]]
        q, k, v = kernels.qk_norm(target, 2, a, b, inplace=True)
        assert torch.equal(wide[..., packed.shape[-1] :], packed)
        assert torch.equal(torch.cat([t.flatten(-2) for t in (q, k, v)], -1), target)
        for got, want in zip((q, k, v), expected, strict=True):
            assert torch.allclose(got.float(), want.float(), atol=1e-6 if dtype == torch.float32 else 1e-2)
    with pytest.raises(ValueError, match="packed: inplace"):
        NATIVE.qk_norm(packed.requires_grad_(), 2, a, b, inplace=True)


def test_patch_merge_order() -> None:
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    got = NATIVE.patch_merge(x, eps=0.0)[0, 0, 0]
    assert torch.allclose(got, torch.nn.functional.layer_norm(torch.tensor([0.0, 4.0, 1.0, 5.0]), (4,), eps=0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bias_gelu(torch.ones(2, 3), torch.ones(2)), "bias: expected shape"),
        (lambda: bias_gelu(torch.ones(2, 3).long()), "x: dtype"),
        (lambda: bias_gelu(torch.tensor(1.0)), "x: expected"),
        (lambda: bias_gelu(torch.ones(2, 3), torch.ones(3, device="meta")), "bias: on device"),
        (lambda: bias_gelu(torch.ones(2, 3), approximate="sigmoid"), "approximate: 'sigmoid'"),
        (lambda: bias_gelu(torch.ones(2, 3), beside=torch.ones(3, 3)), "beside: shape"),
        (lambda: bias_gelu(torch.ones(2, 3), beside=torch.ones(2, 3).half()), "beside: dtype"),
        (lambda: bias_gelu(torch.ones(2, 3), beside=torch.ones(2, 3, device="meta")), "beside: on device"),
        (lambda: qk_norm(torch.ones(2, 20), 2), "packed: the last dimension"),
        (lambda: qk_norm(torch.ones(2, 24), 0), "num_heads: "),
        (lambda: qk_norm(torch.ones(2, 24), 2, torch.ones(5)), "q_weight: expected shape"),
        (lambda: qk_norm(torch.ones(2, 24), 2, None, torch.ones(4).long()), "k_weight: dtype"),
        (lambda: qk_norm(torch.ones(2, 24), 2, eps=-1.0), "eps: "),
        (lambda: patch_merge(torch.ones(1, 3, 4, 2)), "x: expected"),
        (lambda: patch_merge(torch.ones(4, 4, 2)), "x: expected"),
        (lambda: patch_merge(torch.ones(1, 4, 4, 2), torch.ones(2)), "weight: expected shape"),
        (lambda: patch_merge(torch.ones(1, 4, 4, 2), None, torch.ones(8).int()), "bias: dtype"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
