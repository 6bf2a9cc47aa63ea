"""The CUDA kernels: the module loads anywhere; on a GPU, each kernel against the float64 reference on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels import AdamWStep, Kernels, native
from tests.model.kernels.kernel_cases import NATIVE, REFERENCE, assert_close, assert_same, each_dtype, gradients, randn

needs_module = pytest.mark.skipif(native.cuda is None, reason=f"CUDA module not built: {native.cuda_error}")
on_gpu = [
    pytest.mark.gpu,
    needs_module,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Op = Callable[..., Tensor]


def flat(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in outputs])


CASES: dict[str, tuple[Callable[[Kernels], Op], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda k: k.layer_norm, [(70, 387), (387,), (387,)]),
    "layer_norm_wide": (lambda k: k.layer_norm, [(33, 6144), (6144,), (6144,)]),
    "rms_norm": (lambda k: k.rms_norm, [(200, 1024), (1024,)]),
    "add_layer_norm": (lambda k: lambda *a: flat(k.add_layer_norm(*a)), [(50, 96), (50, 96), (96,), (96,)]),
    "qk_norm": (lambda k: lambda x, a, b: flat(k.qk_norm(x, 3, a, b)), [(4, 50, 576), (64,), (64,)]),
    "bias_gelu": (lambda k: k.bias_gelu, [(130, 67), (67,)]),
    "bias_gelu_beside": (lambda k: lambda x, b: k.bias_gelu(x, b, beside=-x[..., :24]), [(130, 67), (67,)]),
    "bias_gelu_tanh": (lambda k: lambda x, b: k.bias_gelu(x, b, approximate="tanh"), [(130, 64), (64,)]),
    "patch_merge": (lambda k: k.patch_merge, [(3, 10, 14, 24), (96,), (96,)]),
    **{
        f"linear_attention_{m}": (
            lambda k, m=m: lambda *a: k.linear_attention(*a, m),
            [(2, 3, 700, 40), (2, 3, 700, 40), (2, 3, 700, 72)],
        )
        for m in ("elu", "relu", "focused")
    },
    "empty": (lambda k: k.layer_norm, [(0, 64), (64,), (64,)]),
}


@needs_module
def test_module_loads_and_counts_devices() -> None:
    """Also where there is no driver: then there are none."""
    assert native.cuda is not None
    assert native.cuda.device_count() == torch.cuda.device_count()
    assert native.cuda.architectures().startswith("sm_")


@pytest.mark.parametrize("case", CASES)
@each_dtype
@pytest.mark.parametrize("strided", [False, True])
class TestOnGpu:
    pytestmark = on_gpu

    def test_matches_float64(self, case: str, dtype: torch.dtype, strided: bool) -> None:
        make, shapes = CASES[case]
        inputs = [randn(*s, dtype=dtype if len(s) > 1 else torch.float32, seed=i) for i, s in enumerate(shapes)]
        grad = randn(*make(REFERENCE)(*inputs).shape, dtype=dtype, seed=9)
        exact, exact_grads = gradients(make(REFERENCE), [t.double() for t in inputs], grad.double())
        device = [t.cuda() for t in inputs]
        if strided:  # an offset of one element, so that nothing is aligned to 16 bytes
            device[0] = torch.cat([device[0][..., :1], device[0]], dim=-1)[..., 1:]
        first = gradients(make(NATIVE), device, grad.cuda())
        again = gradients(make(NATIVE), device, grad.cuda())
        assert_same([first[0], *first[1]], [again[0], *again[1]])
        assert_close("output", first[0].cpu(), exact, ulps=16 if dtype == torch.float32 else 1.5)
        for i, (a, b) in enumerate(zip(first[1], exact_grads, strict=True)):
            assert_close(f"gradient {i}", a.cpu(), b, ulps=32 if a.dtype == torch.float32 else 1.5)


@pytest.mark.gpu
@needs_module
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_dtype
def test_adamw_on_gpu(dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        weight, grad = randn(10007).to(device), randn(10007, dtype=dtype, seed=1).to(device)
        moment, square, model = torch.zeros_like(weight), torch.zeros_like(weight), torch.empty_like(grad)
        NATIVE.adamw(weight, grad, moment, square, model, AdamWStep(lr=0.01, weight_decay=0.1))
        assert torch.equal(model, weight.to(dtype))
        results.append(weight.cpu())
    assert torch.allclose(results[0], results[1], rtol=1e-6, atol=1e-7)
