"""The CUDA kernels: the module loads anywhere; on a GPU, real or emulated, each against the float64 reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels import AdamWStep, Kernels, native
from model.kernels.optimizers import reference_step
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_close,
    assert_same,
    each_dtype,
    gradients,
    method,
    randn,
)

needs_module = pytest.mark.skipif(native.cuda is None, reason=f"CUDA module not built: {native.cuda_error}")
Op = Callable[..., Tensor]
on_gpu = pytest.mark.gpu(multiprocessors=[4])


def flat(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in outputs])


CASES: dict[str, tuple[Callable[[Kernels], Op], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda k: k.layer_norm, [(70, 387), (387,), (387,)]),
    "layer_norm_wide": (lambda k: k.layer_norm, [(33, 6144), (6144,), (6144,)]),
    "rms_norm": (lambda k: k.rms_norm, [(200, 1024), (1024,)]),
    "add_layer_norm": (lambda k: lambda *a: flat(k.add_layer_norm(*a)), [(50, 96), (50, 96), (96,), (96,)]),
    "add_rms_norm": (lambda k: lambda *a: flat(k.add_rms_norm(*a)), [(9, 2048), (9, 2048), (2048,)]),
    "qk_norm": (lambda k: lambda x, a, b: flat(k.qk_norm(x, 3, a, b)), [(4, 50, 576), (64,), (64,)]),
    "bias_gelu": (lambda k: k.bias_gelu, [(130, 67), (67,)]),
    "bias_gelu_beside": (lambda k: lambda x, b: k.bias_gelu(x, b, beside=-x[..., :24]), [(130, 67), (67,)]),
    "bias_gelu_beside_full": (lambda k: lambda x, b: k.bias_gelu(x, b, beside=-x[..., :5]), [(130, 67), (67,)]),
    "bias_gelu_beside_odd": (lambda k: lambda x, b: k.bias_gelu(x, b, beside=-x[..., :25]), [(130, 64), (64,)]),
    "bias_gelu_quick": (lambda k: lambda x, b: k.bias_gelu(x, b, approximate="quick"), [(130, 64), (64,)]),
    "bias_gelu_tanh": (lambda k: lambda x, b: k.bias_gelu(x, b, approximate="tanh"), [(130, 64), (64,)]),
    "patch_merge": (lambda k: k.patch_merge, [(3, 10, 14, 24), (96,), (96,)]),
    "empty": (lambda k: k.layer_norm, [(0, 64), (64,), (64,)]),
}
ATTENTION: dict[str, tuple[Callable[[Kernels], Op], list[tuple[int, ...]]]] = {
    f"linear_attention_{name}": (method("linear_attention", feature_map=feature_map), shapes)
    for name, feature_map, shapes in (
        *((m, m, [(2, 2, 70, 40), (2, 2, 70, 40), (2, 2, 70, 72)]) for m in ("elu", "relu", "focused")),
        ("in_chunks", "elu", [(1, 2, 530, 8)] * 3),
    )
}


@needs_module
def test_module_loads_and_counts_devices() -> None:
    """Also where there is no driver: then there are none."""
    assert native.cuda is not None
    assert native.cuda.device_count() == torch.cuda.device_count()
    assert native.cuda.architectures().startswith("sm_")


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, eighths: bool) -> list[Tensor]:
    """Inputs of a case. Where two are added up, both are whole eighths, whose sum every type holds: kernels round it to
    the type, which float64 does not do."""
    inputs = [randn(*s, dtype=dtype if len(s) > 1 else torch.float32, seed=i) for i, s in enumerate(shapes)]
    return [(8 * t).round() / 8 for t in inputs[:2]] + inputs[2:] if eighths else inputs


def flat_offset(t: Tensor) -> Tensor:
    """t, dense, one element after a multiple of 16 bytes."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "flat_offset": flat_offset,
    "offset": lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:],  # nothing at a multiple of 16 bytes
    "padded": lambda t: torch.cat([t, t[..., : -t.shape[-1] % 8]], dim=-1)[..., : t.shape[-1]],  # every row is
    "odd_stride": lambda t: torch.cat([t, t[..., :1]], dim=-1)[..., :-1],  # the first row is, others are not
}


def check(case: str, dtype: torch.dtype, place: str, which: tuple[int, ...] = (0,)) -> None:
    """With the inputs of those numbers, -1 for the gradient, in that place."""
    make, shapes = (CASES | ATTENTION)[case]
    inputs = drawn(shapes, dtype, eighths=case.startswith("add"))
    grad = randn(*make(REFERENCE)(*inputs).shape, dtype=dtype, seed=9)
    exact, exact_grads = gradients(make(REFERENCE), [t.double() for t in inputs], grad.double())
    device = [t.cuda() for t in (*inputs, grad)]
    for i in which:
        device[i] = PLACES[place](device[i])
    first = gradients(make(NATIVE), device[:-1], device[-1])
    again = gradients(make(NATIVE), device[:-1], device[-1])
    assert_same([first[0], *first[1]], [again[0], *again[1]])
    assert_close("output", first[0].cpu(), exact, ulps=16 if dtype == torch.float32 else 1.5)
    for i, (a, b) in enumerate(zip(first[1], exact_grads, strict=True)):
        assert_close(f"gradient {i}", a.cpu(), b, ulps=32 if a.dtype == torch.float32 else 1.5)


@pytest.mark.gpu(multiprocessors=[1, 4, 132])
@pytest.mark.parametrize("case", CASES)
@each_dtype
@pytest.mark.parametrize("place", PLACES)
def test_matches_float64(case: str, dtype: torch.dtype, place: str) -> None:
    check(case, dtype, place)


@on_gpu
@pytest.mark.parametrize(
    ("case", "which"),
    [
        ("layer_norm_wide", (-1,)),
        ("add_rms_norm", (1,)),
        ("bias_gelu_tanh", (-1,)),
        ("bias_gelu_beside_full", (-1,)),
        ("bias_gelu", (0, -1)),
    ],
)
@each_dtype
@pytest.mark.parametrize("place", [place for place in PLACES if place != "dense"])
def test_other_arrays_anywhere(case: str, which: tuple[int, ...], dtype: torch.dtype, place: str) -> None:
    check(case, dtype, place, which)


@on_gpu
@each_dtype
def test_gradient_of_the_sum_anywhere(dtype: torch.dtype) -> None:
    """The second gradient of a residual norm."""
    x, residual = (randn(9, 256, dtype=dtype, seed=i).cuda().requires_grad_() for i in (1, 2))
    weight = randn(256).cuda()
    grads = [randn(9, 256, dtype=dtype, seed=i).cuda() for i in (3, 4)]
    outputs = NATIVE.add_rms_norm(x, residual, weight)
    aligned = torch.autograd.grad(outputs, [x, residual], grads, retain_graph=True)
    moved = torch.autograd.grad(outputs, [x, residual], [grads[0], flat_offset(grads[1])])
    for a, b in zip(aligned, moved, strict=True):
        torch.testing.assert_close(a, b)


@on_gpu
@pytest.mark.parametrize("case", ATTENTION)
@each_dtype
@pytest.mark.parametrize("place", PLACES)
def test_linear_attention_matches_float64(case: str, dtype: torch.dtype, place: str) -> None:
    check(case, dtype, place)


@on_gpu
@each_dtype
def test_the_sum_is_rounded_to_its_type_on_gpu(dtype: torch.dtype) -> None:
    x, residual, weight = randn(50, 96, dtype=dtype), randn(50, 96, dtype=dtype, seed=1), randn(96, seed=2)
    for name in ("layer_norm", "rms_norm"):
        y, total = getattr(NATIVE, f"add_{name}")(x.cuda(), residual.cuda(), weight.cuda())
        assert torch.equal(total.cpu(), x + residual)
        assert torch.equal(y, getattr(NATIVE, name)(total, weight.cuda()))


@on_gpu
@each_dtype
@pytest.mark.parametrize("unaligned", [None, *range(5)])
def test_adamw_on_gpu(dtype: torch.dtype, unaligned: int | None) -> None:
    """Each array in turn begins one element after a multiple of 16 bytes."""
    arrays = [torch.zeros(10008, dtype=dtype if i in (1, 4) else torch.float32).cuda() for i in range(5)]
    arrays = [t[1:] if i == unaligned else t[:-1] for i, t in enumerate(arrays)]
    weight, grad, moment, square, model = arrays
    weight.copy_(randn(10007))
    grad.copy_(randn(10007, dtype=dtype, seed=1))
    exact = [t.cpu().double() for t in arrays[:4]]
    step = AdamWStep(lr=0.01, weight_decay=0.1)
    reference_step(*exact, None, step)
    NATIVE.adamw(weight, grad, moment, square, model, step)
    assert torch.equal(model, weight.to(dtype))
    for name, got, wanted in zip(
        ("weight", "moment", "square"), (weight, moment, square), (exact[0], *exact[2:]), strict=True
    ):
        assert_close(name, got.cpu(), wanted, ulps=2)


@pytest.mark.gpu
def test_more_heads_than_a_grid_is_high_on_gpu() -> None:
    """65,536 groups of chunks: only the first dimension of blocks may be as large. (Two minutes in emulation.)"""
    inputs = [randn(65536, 1, 2, 2, seed=i) for i in range(3)]
    grad = randn(65536, 1, 2, 2, seed=4)
    exact, exact_grads = gradients(REFERENCE.linear_attention, [t.double() for t in inputs], grad.double())
    out, grads = gradients(NATIVE.linear_attention, [t.cuda() for t in inputs], grad.cuda())
    assert_close("output", out.cpu(), exact, ulps=16)
    for i, name in enumerate("qkv"):
        assert_close(f"gradient of {name}", grads[i].cpu(), exact_grads[i], ulps=64)


@on_gpu
@pytest.mark.parametrize(("power", "dim"), [(20, 256), (30, 64)])
def test_high_powers_of_focused_features_on_gpu(power: int, dim: int) -> None:
    inputs = [randn(1, 2, 7, dim, seed=i) for i in range(3)]
    grad = randn(1, 2, 7, dim, seed=4)
    op = method("linear_attention", feature_map="focused", power=power)
    exact, exact_grads = gradients(op(REFERENCE), [t.double() for t in inputs], grad.double())
    out, grads = gradients(op(NATIVE), [t.cuda() for t in inputs], grad.cuda())
    assert_close("output", out.cpu(), exact, ulps=4 * power)
    for i, name in enumerate("qkv"):
        assert_close(f"gradient of {name}", grads[i].cpu(), exact_grads[i], ulps=16 * power)


@on_gpu
@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "focused"])
def test_features_of_what_is_not_finite_on_gpu(feature_map: str, bad: float) -> None:
    for which in (0, 1):
        inputs = [randn(1, 2, 9, 8, seed=i) for i in range(3)]
        inputs[which][0, 1, 4, 3] = bad
        grad = randn(1, 2, 9, 8, seed=5)
        op = method("linear_attention", feature_map=feature_map)
        exact, exact_grads = gradients(op(REFERENCE), [t.double() for t in inputs], grad.double())
        got, got_grads = gradients(op(NATIVE), [t.cuda() for t in inputs], grad.cuda())
        for a, b in zip([got, *got_grads], [exact, *exact_grads], strict=True):
            assert torch.allclose(a.cpu().double(), b, rtol=1e-4, atol=1e-4, equal_nan=True)
