"""The ends of the number range, tensors whose memory does not say all, arguments that would be read beyond."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels import AdamWStep, Kernels
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_same,
    check_against_float64,
    gradients,
    method,
    needs_cpu_module,
    randn,
)

pytestmark = needs_cpu_module
each_form = pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
Op = Callable[[Kernels], Callable[..., Tensor]]

OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "layer_norm": (method("layer_norm"), [(6, 20), (20,), (20,)]),
    "rms_norm": (method("rms_norm", memory_efficient=True), [(6, 20), (20,), (20,)]),
    "add_layer_norm": (lambda k: lambda *a: torch.cat(k.add_layer_norm(*a)), [(6, 20), (6, 20), (20,), (20,)]),
    "qk_norm": (lambda k: lambda x, *w: torch.cat(k.qk_norm(x, 2, *w)), [(5, 48), (8,), (8,)]),
    "bias_gelu": (lambda k: lambda x, b, left: k.bias_gelu(x, b, beside=left), [(6, 20), (20,), (6, 12)]),
    "patch_merge": (method("patch_merge"), [(1, 4, 6, 5), (20,), (20,)]),
    "linear_attention": (method("linear_attention"), [(1, 2, 9, 8)] * 3),
    "over_ranks": (method("linear_attention", reduce=lambda sums: None), [(1, 2, 9, 8)] * 3),
}
each_op = pytest.mark.parametrize("name", OPS)


@pytest.mark.parametrize(("power", "dim"), [(20, 256), (30, 64), (60, 3)])
@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
@each_form
def test_high_powers_of_focused_features(kernels: Kernels, power: int, dim: int, equal: bool) -> None:
    """Powers of u / |u| may all vanish: of 256 equal entries each is 1/16, and 16^-40 is below fp32's range."""
    inputs = [randn(1, 2, 7, dim, seed=i) for i in range(3)]
    if equal:
        inputs[:2] = [t.sign() * torch.arange(1, 8)[:, None] for t in inputs[:2]]
    op = method("linear_attention", feature_map="focused", power=power)
    check_against_float64(lambda k: op(kernels if k is NATIVE else k), inputs, ulps=4 * power, grad_ulps=16 * power)


@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "focused"])
@pytest.mark.parametrize("which", [0, 1])
def test_features_of_what_is_not_finite(feature_map: str, bad: float, which: int) -> None:
    """Zero with a gradient of zero at -inf; NaN where the reference has it."""
    inputs = [randn(1, 2, 9, 8, seed=i) for i in range(3)]
    inputs[which][0, 1, 4, 3] = bad
    grad = randn(1, 2, 9, 8, seed=5)
    op = method("linear_attention", feature_map=feature_map)
    got, got_grads = gradients(op(NATIVE), inputs, grad)
    exact, exact_grads = gradients(op(REFERENCE), [t.double() for t in inputs], grad.double())
    for a, b in zip([got, *got_grads], [exact, *exact_grads], strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert exact.isnan().any() == (bad != bad)


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_gelu_with_the_largest_gradients(approximate: str) -> None:
    """Far out the slope is zero and not the least number, of which 3e38 makes 10^7 and infinity another infinity.
    (At -12 torch's float64 slope is off by a 144th: to it the distribution function is zero there.)"""
    x = torch.cat([torch.linspace(-60, -12, 97), torch.tensor([-1e15, -3e38])])
    op = method("bias_gelu", approximate=approximate)
    _, (slope, _) = gradients(op(REFERENCE), [x.double(), torch.zeros(99).double()], torch.ones(99).double())
    _, (got, bias) = gradients(op(NATIVE), [x, torch.zeros(99)], torch.full((99,), 3e38))
    least = torch.finfo(torch.float32).tiny
    assert torch.allclose(got.double(), slope * 3e38, rtol=1e-2, atol=16 * least * 3e38)
    assert torch.equal(bias, got)
    far = x < (-200 if approximate == "quick" else -15)
    _, (got,) = gradients(op(NATIVE), [x[far], None], torch.full((int(far.sum()),), float("inf")))
    assert got.isnan().all()


def minus(t: Tensor) -> Tensor:
    """A view of t's memory that means -t."""
    return torch._neg_view(t)


def whole(t: Tensor) -> Tensor:
    return t.resolve_neg().clone() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype)


@each_op
@pytest.mark.parametrize("view", [minus, lambda t: torch._efficientzerotensor(t.shape)], ids=["minus", "zeros"])
def test_views_without_their_values_in_memory(name: str, view: Callable[[Tensor], Tensor]) -> None:
    """Each argument and the gradient as a view with a sign to apply, and as zeros without memory."""
    op, shapes = OPS[name]
    inputs = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    grad = randn(*op(NATIVE)(*inputs).shape, seed=9)
    for i in range(len(inputs) + 1):
        values = [*inputs, grad]
        values[i] = view(values[i])
        assert values[i].is_neg() or values[i]._is_zerotensor()
        got, got_grads = gradients(op(NATIVE), values[:-1], values[-1])
        values[i] = whole(values[i])
        dense, dense_grads = gradients(op(NATIVE), values[:-1], values[-1])
        assert_same([got, *got_grads], [dense, *dense_grads])


def test_such_views_cannot_be_written_to() -> None:
    for bad in (minus(randn(8)), torch._efficientzerotensor((8,))):
        for i in range(5):
            arrays = [randn(8, seed=j).abs() for j in range(5)]
            arrays[i] = bad
            with pytest.raises(ValueError, match="sign to apply"):
                NATIVE.adamw(*arrays, AdamWStep(lr=0.1))
    with pytest.raises(ValueError, match="packed: a view with a sign to apply"):
        NATIVE.qk_norm(minus(randn(2, 24)), 2, inplace=True)


@each_op
@pytest.mark.parametrize("kernels", [Kernels("auto"), NATIVE, REFERENCE], ids=["auto", "native", "reference"])
def test_other_layouts_are_refused(name: str, kernels: Kernels) -> None:
    op, shapes = OPS[name]
    for i in range(len(shapes)):
        inputs = [randn(*shape) for shape in shapes]
        for bad in (inputs[i].to_sparse(), torch.nested.nested_tensor([inputs[i]])):
            with pytest.raises(ValueError, match=r"the kernels take strided tensors"):
                op(kernels)(*[bad if j == i else t for j, t in enumerate(inputs)])


@pytest.mark.parametrize("eps", [float("nan"), -1.0])
@pytest.mark.parametrize(
    "call",
    [
        lambda k, eps: k.layer_norm(randn(2, 4), eps=eps),
        lambda k, eps: k.rms_norm(randn(2, 4), eps=eps),
        lambda k, eps: k.add_rms_norm(randn(2, 4), randn(2, 4), eps=eps),
        lambda k, eps: k.qk_norm(randn(2, 24), 2, eps=eps),
        lambda k, eps: k.patch_merge(randn(1, 2, 2, 4), eps=eps),
        lambda k, eps: k.linear_attention(*[randn(1, 1, 3, 4)] * 3, eps=eps),
    ],
)
@each_form
def test_bad_eps_is_named(kernels: Kernels, call: Callable[[Kernels, float], object], eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps: must be .* got {eps}"):
        call(kernels, eps)


OPERATORS = torch.ops.vitruvius
X, W, ROW = torch.ones(3, 4), torch.ones(4), torch.ones(3)
QKV, STATE, KEYS, DEN = torch.ones(1, 2, 5, 4), torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 5)
PACKED, STATISTICS, HEADS = torch.ones(3, 24), torch.ones(2, 3, 2), torch.ones(3, 2, 4)
GRID, MERGED = torch.ones(1, 2, 4, 3), torch.ones(1, 1, 2, 12)
GOOD: dict[str, list[object]] = {
    "norm": [X, X, W, W, 1e-6, False, torch.float32, False],
    "norm_backward": [X, X, X, W, W, ROW, ROW, torch.float32, False],
    "bias_gelu": [X, W, 0, X],
    "bias_gelu_backward": [X, X, W, 0],
    "qk_norm": [PACKED, W, W, 2, 1e-6, False],
    "qk_norm_": [PACKED, W, W, 2, 1e-6, False],
    "qk_norm_backward": [HEADS, HEADS, HEADS, PACKED, W, W, STATISTICS, STATISTICS, 2],
    "patch_merge": [GRID, torch.ones(12), torch.ones(12), 1e-6],
    "patch_merge_backward": [MERGED, GRID, torch.ones(12), torch.ones(12), MERGED[..., 0], MERGED[..., 0]],
    "linear_attention": [QKV, QKV, QKV, "elu", 3, 1e-6],
    "linear_attention_backward": [QKV, QKV, QKV, QKV, STATE, KEYS, DEN, "elu", 3],
}


@pytest.mark.parametrize("name", GOOD)
def test_operators_check_what_they_are_given(name: str) -> None:
    """Short, of another type, without memory, or sparse: each tensor of each operator, called without `Kernels`."""
    operator, good = getattr(OPERATORS, name), GOOD[name]
    operator(*good)
    for i, value in enumerate(good):
        if not isinstance(value, Tensor):
            continue
        for bad in (value.flatten()[:-1], value.double(), value.long()):
            with pytest.raises(ValueError, match=r"^\w+: "):
                operator(*good[:i], bad, *good[i + 1 :])
