"""Linear attention against float64."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from model.kernels import Kernels, linear_attention
from model.kernels.reference import depthwise_conv
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
FEATURES = ("elu", "relu", "focused")
each_feature = pytest.mark.parametrize("feature_map", FEATURES)


def qkv(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, seed=i, scale=scale) for i in range(3)]


@each_feature
@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 2, 3, 5), (2, 3, 25, 16), (1, 2, 197, 64), (2, 1, 100, 80), (1, 1, 2050, 33)]
)
def test_matches_float64(feature_map: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = qkv(*shape, dtype=dtype)
    if feature_map != "elu":  # keep clear of a normaliser near zero, where the function itself is ill-conditioned
        q, k = q.abs() + 0.1, k.abs() + 0.1
    check_against_float64(
        method("linear_attention", feature_map=feature_map), [q, k, v], ulps=16, grad_ulps=64, floor=1e-6
    )


@each_feature
def test_signed_inputs(feature_map: str) -> None:
    """About half of the entries are cut to zero by relu and focused."""
    q, k, v = qkv(2, 2, 150, 32)
    check_against_float64(method("linear_attention", feature_map=feature_map), [q, k, v], ulps=16, grad_ulps=64)


@pytest.mark.parametrize("power", [1, 2, 5])
def test_focused_powers(power: int) -> None:
    check_against_float64(
        method("linear_attention", feature_map="focused", power=power), qkv(1, 2, 60, 24), ulps=16, grad_ulps=64
    )


def test_values_of_another_width() -> None:
    q, k, _ = qkv(2, 2, 70, 24)
    check_against_float64(method("linear_attention"), [q, k, randn(2, 2, 70, 40, seed=7)], ulps=16, grad_ulps=64)


@each_feature
@each_dtype
def test_strided_inputs(feature_map: str, dtype: torch.dtype) -> None:
    """q, k, v as they come out of a packed projection, and a gradient as it comes out of a transpose."""
    packed = randn(2, 50, 3, 4, 16, dtype=dtype)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    grad = randn(2, 50, 4, 16, dtype=dtype, seed=8).transpose(1, 2)
    op = method("linear_attention", feature_map=feature_map)(NATIVE)
    got, got_grads = gradients(op, views, grad)
    dense, dense_grads = gradients(op, [t.contiguous() for t in views], grad.contiguous())
    assert_same([got, *got_grads], [dense, *dense_grads])
    backwards = torch.flip(views[0], (3,))[..., ::2]
    assert torch.equal(op(backwards, backwards, backwards), op(*[backwards.contiguous()] * 3))


@each_feature
@each_dtype
def test_same_bits_with_any_number_of_threads(feature_map: str, dtype: torch.dtype) -> None:
    inputs, grad = qkv(1, 3, 2500, 16, dtype=dtype), randn(1, 3, 2500, 16, seed=5)
    results = []
    for count in (1, 2, 2, 3):
        with threads(count):
            out, grads = gradients(method("linear_attention", feature_map=feature_map)(NATIVE), inputs, grad)
            results.append([out, *grads])
    for other in results[1:]:
        assert_same(results[0], other)


@each_feature
def test_empty(feature_map: str) -> None:
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        out, grads = gradients(
            method("linear_attention", feature_map=feature_map)(NATIVE), qkv(*shape), torch.empty(shape)
        )
        assert out.shape == shape
        assert all(g.shape == shape for g in grads)


@each_feature
@pytest.mark.parametrize("scale", [1e-15, 1e4, 1e15])
def test_extreme_magnitudes(feature_map: str, scale: float) -> None:
    """Homogeneous features cancel their scale; elu's exp meets arguments far below and above its range."""
    q, k, v = qkv(1, 2, 40, 16)
    out = NATIVE.linear_attention(q * scale, k * scale, v, feature_map, eps=0.0)
    exact = REFERENCE.linear_attention(*((q * scale).double(), (k * scale).double(), v.double()), feature_map, eps=0.0)
    assert torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-5)


def test_fp16_sums_do_not_overflow() -> None:
    q, k, v = (torch.full((1, 1, 3000, 16), 30.0, dtype=torch.float16) for _ in range(3))
    out, grads = gradients(method("linear_attention")(NATIVE), [q, k, v], torch.ones(1, 1, 3000, 16))
    assert torch.equal(out, v)
    assert all(g.isfinite().all() for g in grads)


@each_feature
def test_nan_stays_in_its_head(feature_map: str) -> None:
    q, k, v = qkv(2, 2, 30, 16)
    k[0, 1, 29, 15] = float("nan")
    out = NATIVE.linear_attention(q, k, v, feature_map)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_without_positive_features_the_result_is_zero() -> None:
    q = -torch.ones(1, 1, 4, 8)
    for feature_map in ("relu", "focused"):
        out, grads = gradients(
            method("linear_attention", feature_map=feature_map)(NATIVE), [q, q, q], torch.ones(1, 1, 4, 8)
        )
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(grads[0], torch.zeros_like(q))


def test_keeps_only_sums_beside_its_inputs() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(2, 3, 500, 16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        NATIVE.linear_attention(q, k, v)
    extra = [t for t in kept if t.data_ptr() not in {q.data_ptr(), k.data_ptr(), v.data_ptr()}]
    assert sorted(t.numel() for t in extra) == sorted([6 * 16 * 16, 6 * 16, 6 * 500])


def test_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    inputs, grad = qkv(1, 2, 30, 16), randn(1, 2, 30, 16, seed=4)
    compiled = torch.compile(NATIVE.linear_attention, backend="aot_eager", fullgraph=True)
    got, got_grads = gradients(compiled, inputs, grad)
    eager, eager_grads = gradients(NATIVE.linear_attention, inputs, grad)
    assert_same([got, *got_grads], [eager, *eager_grads])


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_convolution_leaves_prefix_tokens_alone(kernels: Kernels) -> None:
    q, k, v = qkv(2, 2, 3 + 4 * 5, 8)
    weight, bias = randn(8, 3, 3, seed=5), randn(8, seed=6)
    plain = kernels.linear_attention(q, k, v)
    out = kernels.linear_attention(q, k, v, conv_weight=weight, conv_bias=bias, grid=(4, 5))
    assert torch.equal(out[:, :, :3], plain[:, :, :3])
    expected = torch.zeros(8, 4, 5)
    image = torch.nn.functional.pad(v[1, 1, 3:].reshape(4, 5, 8).permute(2, 0, 1), (1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            expected += weight[:, i, j, None, None] * image[:, i : i + 4, j : j + 5]
    expected = (expected + bias[:, None, None]).permute(1, 2, 0).reshape(20, 8)
    assert torch.allclose(out[1, 1, 3:] - plain[1, 1, 3:], expected, atol=1e-5)
    assert torch.equal(depthwise_conv(v, weight, bias, (4, 5))[:, :, :3], torch.zeros(2, 2, 3, 8))


class Ranks:
    """A sum over threads that stand for ranks. Every thread sees the same bits; `calls` counts them all."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=30)
        self.shares: dict[int, Tensor] = {}
        self.calls = 0

    def reduce(self, rank: int, x: Tensor) -> None:
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        self.shares[rank] = x
        self.barrier.wait()
        total = torch.stack([self.shares[i] for i in sorted(self.shares)]).sum(0)
        if self.barrier.wait() == 0:
            self.calls += len(self.shares)
        x.copy_(total)

    def run(
        self, kernels: Kernels, feature_map: str, inputs: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """Output and gradients of each rank; inputs[rank]: q, k, v."""

        def one(rank: int) -> tuple[Tensor, list[Tensor]]:
            op = method("linear_attention", feature_map=feature_map, reduce=lambda x: self.reduce(rank, x))(kernels)
            try:
                return gradients(op, inputs[rank], grads[rank])
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(inputs)) as pool:
            return list(pool.map(one, range(len(inputs))))


def positive_qkv(tokens: int, dtype: torch.dtype, feature_map: str) -> list[Tensor]:
    """q, k: [2, 3, tokens, 24], v: [2, 3, tokens, 40]; away from a normaliser near zero."""
    q, k, v = (randn(2, 3, tokens, 40 if i == 2 else 24, dtype=dtype, seed=i) for i in range(3))
    return [q, k, v] if feature_map == "elu" else [q.abs() + 0.1, k.abs() + 0.1, v]


each_form = pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])


@each_form
@each_feature
@each_dtype
@pytest.mark.parametrize("counts", [(60, 61), (130, 1), (0, 50), (40, 0, 7), (0, 0)])
def test_tokens_split_over_ranks(
    kernels: Kernels, feature_map: str, dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    """Output and gradients are those of the whole sequence; one sum forward and one backward on every rank."""
    whole = positive_qkv(sum(counts), dtype, feature_map)
    grad = randn(2, 3, sum(counts), 40, dtype=dtype, seed=9)
    exact, exact_grads = gradients(
        method("linear_attention", feature_map=feature_map)(REFERENCE), [t.double() for t in whole], grad.double()
    )
    ranks = Ranks(len(counts))
    parts = list(zip(*(t.split(counts, dim=2) for t in whole), strict=True))
    results = ranks.run(kernels, feature_map, parts, grad.split(counts, dim=2))
    assert ranks.calls == 2 * len(counts)
    assert [out.shape[2] for out, _ in results] == list(counts)
    assert_close("output", torch.cat([out for out, _ in results], 2), exact, ulps=16)
    for i, name in enumerate("qkv"):
        got = torch.cat([grads[i] for _, grads in results], 2)
        assert_close(f"gradient of {name}", got, exact_grads[i], 64 if dtype == torch.float32 else 1, 1e-6)


@each_feature
@each_dtype
def test_one_rank_gives_the_bits_of_the_plain_call(feature_map: str, dtype: torch.dtype) -> None:
    """Strided inputs, more than one chunk of tokens."""
    packed, grad = randn(1, 2100, 3, 2, 16, dtype=dtype), randn(1, 2, 2100, 16, seed=8)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    plain, plain_grads = gradients(method("linear_attention", feature_map=feature_map)(NATIVE), views, grad)
    op = method("linear_attention", feature_map=feature_map, reduce=lambda x: None)(NATIVE)
    out, grads = gradients(op, views, grad)
    assert_same([out, *grads], [plain, *plain_grads])


@each_form
def test_every_rank_takes_part_in_backward(kernels: Kernels) -> None:
    """Also where only one of its tensors wants a gradient, of q even, whose own needs no sum."""
    calls: list[int] = []
    q, k, v = qkv(1, 2, 5, 8)
    for wanted in (q, k, v):
        calls.clear()
        wanted.requires_grad_()
        kernels.linear_attention(q, k, v, reduce=lambda x: calls.append(x.numel())).sum().backward()
        wanted.requires_grad_(False)
        assert calls == [2 * 8 * 8 + 2 * 8] * 2


@pytest.mark.gpu(multiprocessors=[4])
@each_feature
@each_dtype
@pytest.mark.parametrize("tokens", [0, 700])
def test_two_equal_ranks_on_gpu(feature_map: str, dtype: torch.dtype, tokens: int) -> None:
    """The sum over two ranks with the same tokens is twice either's: no second rank is needed."""
    inputs = positive_qkv(tokens, dtype, feature_map)
    grad = randn(2, 3, tokens, 40, dtype=dtype, seed=9)
    twice = [torch.cat([t.double()] * 2, 2) for t in (*inputs, grad)]
    exact, exact_grads = gradients(method("linear_attention", feature_map=feature_map)(REFERENCE), twice[:3], twice[3])
    op = method("linear_attention", feature_map=feature_map, reduce=lambda x: x.mul_(2))(NATIVE)
    out, grads = gradients(op, [t.cuda() for t in inputs], grad.cuda())
    assert_close("output", out.cpu(), exact[:, :, :tokens], ulps=16)
    for i, name in enumerate("qkv"):
        got = grads[i].cpu()
        assert_close(
            f"gradient of {name}", got, exact_grads[i][:, :, :tokens], 64 if dtype == torch.float32 else 1.5, 1e-6
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, "q: expected shape"),
        ({"q": torch.ones(1, 1, 4, 8, dtype=torch.int64)}, "q: dtype"),
        ({"k": torch.ones(1, 1, 5, 8)}, "k: shape"),
        ({"k": torch.ones(1, 1, 4, 8).half()}, "k: dtype"),
        ({"k": torch.ones(1, 1, 4, 8, device="meta")}, "k: on device"),
        ({"v": torch.ones(1, 1, 5, 8)}, "v: expected shape"),
        ({"v": torch.ones(1, 1, 4, 8).half()}, "v: dtype"),
        ({"feature_map": "gelu"}, "feature_map: 'gelu'"),
        ({"power": 0}, "power: "),
        ({"conv_weight": torch.ones(8, 2, 2), "grid": (2, 2)}, "conv_weight: "),
        ({"conv_weight": torch.ones(8, 3, 3), "grid": (2, 2), "reduce": torch.Tensor.zero_}, "conv_weight: .* reduce"),
        ({"conv_weight": torch.ones(8, 3, 3)}, "grid: "),
        ({"conv_weight": torch.ones(8, 3, 3), "grid": (3, 3)}, "grid: 3 x 3"),
        ({"conv_weight": torch.ones(8, 3, 3), "conv_bias": torch.ones(7), "grid": (2, 2)}, "conv_bias: "),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {name: torch.ones(1, 1, 4, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        linear_attention(**(good | change))
