"""LayerNorm and RMSNorm against float64."""

import pytest
import torch

from model.kernels import Kernels, layer_norm, native
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_close,
    assert_same,
    check_against_float64,
    each_dtype,
    gradients,
    method,
    needs_cpu_module,
    randn,
    threads,
)

pytestmark = needs_cpu_module
NORMS = ("layer_norm", "rms_norm")
each_norm = pytest.mark.parametrize("norm", NORMS)


def params(dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(dim, seed=1, dtype=dtype, shift=1), randn(dim, seed=2, dtype=dtype)


@each_norm
@each_dtype
@pytest.mark.parametrize("shape", [(3, 2), (1, 7), (5, 16), (2, 3, 65), (130, 384), (9, 1023), (3, 6144)])
@pytest.mark.parametrize("with_params", ["none", "weight", "both"])
def test_matches_float64(norm: str, dtype: torch.dtype, shape: tuple[int, ...], with_params: str) -> None:
    weight, bias = params(shape[-1])
    x = randn(*shape, dtype=dtype, shift=0.5)
    floor = 1e-4 if shape[-1] == 2 else 0.0  # the exact gradient of a norm over two elements is nearly zero everywhere
    inputs = [x, None if with_params == "none" else weight, bias if with_params == "both" else None]
    check_against_float64(method(norm), inputs, ulps=8 if dtype == torch.float32 else 1, floor=floor)


@each_norm
@each_dtype
def test_parameters_of_the_input_type(norm: str, dtype: torch.dtype) -> None:
    check_against_float64(
        method(norm), [randn(33, 96, dtype=dtype), *params(96, dtype)], ulps=8 if dtype == torch.float32 else 1
    )


@each_norm
@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)]
)
def test_output_cast(norm: str, dtype: torch.dtype, out: torch.dtype) -> None:
    x, (weight, bias) = randn(21, 80, dtype=dtype), params(80)
    y = getattr(NATIVE, norm)(x, weight, bias, out_dtype=out)
    assert y.dtype == out
    grad = randn(21, 80, dtype=out, seed=9)
    got, got_grads = gradients(method(norm, out_dtype=out)(NATIVE), [x, weight, bias], grad)
    exact, exact_grads = gradients(method(norm)(REFERENCE), [x.double(), weight.double(), bias.double()], grad.double())
    assert_close("output", got, exact, ulps=8 if out == torch.float32 else 1)
    for a, b in zip(got_grads, exact_grads, strict=True):
        assert_close("gradient", a, b, ulps=16 if a.dtype == torch.float32 else 1)


@each_norm
def test_mean_far_from_zero(norm: str) -> None:
    """The variance is taken about the mean: an offset of 10^4 standard deviations costs only the input's own
    rounding."""
    x = randn(40, 257, shift=1e4)
    check_against_float64(method(norm), [x, *params(257)], ulps=3e4, grad_ulps=3e4)


@each_norm
@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_extreme_magnitudes(norm: str, scale: float) -> None:
    check_against_float64(method(norm, eps=0.0), [randn(7, 200, scale=scale), *params(200)], ulps=8)


@each_norm
@each_dtype
def test_strided_and_expanded_inputs(norm: str, dtype: torch.dtype) -> None:
    weight, bias = params(48)
    wide = randn(4, 10, 144, dtype=dtype)
    for x in (wide[..., 48:96], wide.transpose(0, 1)[..., :48], wide[..., ::3], wide[:1, :, :48].expand(4, 10, 48)):
        assert not x.is_contiguous()
        expected = gradients(method(norm)(NATIVE), [x.contiguous(), weight, bias], randn(*x.shape, dtype=dtype, seed=5))
        grad = randn(*x.shape[1:], x.shape[0], dtype=dtype, seed=6).movedim(-1, 0)
        expected = gradients(method(norm)(NATIVE), [x.contiguous(), weight, bias], grad.contiguous())
        got = gradients(method(norm)(NATIVE), [x, weight, bias], grad)
        assert_same([got[0], *got[1]], [expected[0], *expected[1]])


@each_norm
def test_empty_batch(norm: str) -> None:
    weight, bias = params(8)
    out, grads = gradients(method(norm)(NATIVE), [randn(0, 3, 8), weight, bias], torch.empty(0, 3, 8))
    assert out.shape == (0, 3, 8)
    assert torch.equal(grads[1], torch.zeros(8))
    assert torch.equal(grads[2], torch.zeros(8))


@each_norm
@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_own_row_only(norm: str, dtype: torch.dtype, bad: float) -> None:
    x, (weight, bias) = randn(6, 50, dtype=dtype), params(50)
    clean = getattr(NATIVE, norm)(x, weight, bias)
    x[2, 49] = bad
    y = getattr(NATIVE, norm)(x, weight, bias)
    assert y[2, 49].isnan()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(y[keep], clean[keep])


@each_norm
@each_dtype
def test_same_bits_again_and_with_any_number_of_threads(norm: str, dtype: torch.dtype) -> None:
    inputs = [randn(700, 130, dtype=dtype), *params(130)]
    grad = randn(700, 130, dtype=dtype, seed=3)
    results = []
    for count in (1, 2, 2, 3):
        with threads(count):
            out, grads = gradients(method(norm)(NATIVE), inputs, grad)
            results.append([out, *grads])
    for other in results[1:]:
        assert_same(results[0], other)


@each_norm
@each_dtype
def test_memory_efficient_gradients(norm: str, dtype: torch.dtype) -> None:
    """From y instead of x: as exact as y itself is, so within a few units of its last place."""
    x = randn(90, 72, dtype=dtype)
    weight, bias = randn(72, seed=1).abs() + 0.5, randn(72, seed=2)
    grad = randn(90, 72, dtype=dtype, seed=3)
    _, got = gradients(method(norm, memory_efficient=True)(NATIVE), [x, weight, bias], grad)
    _, exact = gradients(method(norm)(REFERENCE), [x.double(), weight.double(), bias.double()], grad.double())
    for a, b in zip(got, exact, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error <= 4 * torch.finfo(dtype).eps


def test_memory_efficient_keeps_the_output() -> None:
    x, weight = randn(8, 16).requires_grad_(), torch.ones(16)
    for efficient in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            y = NATIVE.layer_norm(x, weight, memory_efficient=efficient)
        assert (y.data_ptr() in kept) == efficient
        assert (x.data_ptr() in kept) == (not efficient)


@each_norm
def test_compiles_without_graph_break(norm: str) -> None:
    torch._dynamo.reset()
    inputs = [randn(5, 24), *params(24)]
    fn = getattr(NATIVE, norm)
    compiled = torch.compile(lambda x, w, b: fn(x, w, b) * 2, backend="aot_eager", fullgraph=True)
    grad = randn(5, 24, seed=4)
    got, got_grads = gradients(compiled, inputs, grad)
    eager, eager_grads = gradients(lambda x, w, b: fn(x, w, b) * 2, inputs, grad)
    assert_same([got, *got_grads], [eager, *eager_grads])


def test_operator_registration() -> None:
    args = (randn(4, 8).requires_grad_(), None, randn(8).requires_grad_(), None, 1e-6, False, torch.float32, False)
    result = torch.library.opcheck(torch.ops.vitruvius.norm, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x: .*scalar"),
        ({"x": torch.ones(2, 0)}, "x: .*empty"),
        ({"x": torch.ones(2, 4, dtype=torch.int32)}, "x: .*int32"),
        ({"x": [1.0]}, "x: .*list"),
        ({"weight": torch.ones(3)}, r"weight: shape \[3\]"),
        ({"weight": torch.ones(1, 4)}, "weight: shape"),
        ({"bias": torch.ones(5)}, r"bias: shape \[5\]"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, "bias: dtype"),
        ({"weight": torch.ones(4, device="meta")}, "weight: on device meta"),
        ({"eps": -1.0}, "eps: "),
        ({"out_dtype": torch.int8}, "out_dtype: "),
    ],
)
@each_norm
def test_bad_arguments_are_named(norm: str, arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"x": torch.ones(2, 4), "weight": torch.ones(4)}
    for kernels in (Kernels("auto"), NATIVE, REFERENCE):
        with pytest.raises(ValueError, match=message):
            getattr(kernels, norm)(**(good | arguments))


def test_types_without_a_kernel() -> None:
    x = randn(2, 4).double()
    assert layer_norm(x).dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype: torch.float64 has no native kernel"):
        NATIVE.layer_norm(x)
    with pytest.raises(ValueError, match="out_dtype"):
        NATIVE.layer_norm(randn(2, 4, dtype=torch.bfloat16), out_dtype=torch.float16)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="kernels: 'fast' is not one of auto, native, reference"):
        Kernels("fast")


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "cpu_error", "No module named 'model.kernels._cpu'")
    x = randn(3, 8)
    assert torch.equal(layer_norm(x), torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
    with pytest.raises(ValueError, match="pip install -e"):
        NATIVE.layer_norm(x)
    assert "pip install -e" in Kernels().describe()[0]


def test_describe_says_what_is_live() -> None:
    lines = "\n".join(Kernels().describe())
    assert native.cpu is not None
    assert native.cpu.instruction_set() in lines
    assert "layer_norm" in lines
    assert Kernels("reference").describe() == ["kernels: reference (plain PyTorch), as asked"]
