"""NVIDIA apex told apart from the other apex, and its kernels through stand-ins of the same signatures."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from model.kernels import AdamWStep, apex
from model.kernels.optimizers import reference_step

# Each package is what stands in its files, relative to a folder on sys.path.
PYRAMID = {"apex/__init__.py": "raise RuntimeError('never to be run')", "apex/lib/__init__.py": ""}
NVIDIA = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "class FusedAdam: pass",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch
from torch.nn import functional as F
def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype
    return F.layer_norm(input, normalized_shape, weight, bias, eps)
def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input.to(weight.dtype), normalized_shape, weight, bias, eps)
""",
}
KERNELS = {
    "fused_layer_norm_cuda.py": "",
    "amp_C.py": """
def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
    assert mode == 1 and bias_correction == 1 and chunk == 65536 and noop.numel() == 1
    for g, p, m, v in zip(*lists, strict=True):
        assert g.dtype == p.dtype == m.dtype == v.dtype
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        denom = (v / (1 - beta2**step)).sqrt() + eps
        p.copy_(p - lr * (m / (1 - beta1**step) / denom + decay * p))
""",
}
Install = Callable[[dict[str, str]], None]


def _forget() -> None:
    apex._find.cache_clear()
    for name in list(sys.modules):
        if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda"):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes packages where the import system looks first."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        _forget()

    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield write
    monkeypatch.undo()
    _forget()


@pytest.fixture
def as_if_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "_on_gpu", lambda x: True)


def test_another_apex_is_named_and_ignored_and_not_run(install: Install, tmp_path: Path) -> None:
    install(PYRAMID)
    with pytest.warns(UserWarning, match="is not NVIDIA's and is ignored") as caught:
        assert apex.find_apex() is None
    text = str(caught[0].message)
    assert str(tmp_path) in text and "pip uninstall apex" in text and "github.com/NVIDIA/apex" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apex.find_apex() is None  # said once
    assert apex.describe().startswith("apex: not used, the installed package of that name (")
    assert "apex" not in sys.modules


def test_a_folder_of_that_name_is_no_package(install: Install) -> None:
    install({"apex/README.md": "a clone's top folder"})
    with pytest.warns(UserWarning, match="is not NVIDIA's"):
        assert apex.find_apex() is None


def test_no_apex(monkeypatch: pytest.MonkeyPatch, as_if_on_gpu: None) -> None:
    monkeypatch.setattr(apex, "find_spec", lambda name: None)
    _forget()
    assert apex.find_apex() is None and apex.describe() == "apex: not used, not installed"
    with pytest.raises(RuntimeError, match="apex layer_norm: not installed; build it in a clone"):
        apex.layer_norm(torch.ones(2, 3), torch.ones(3), torch.zeros(3), 1e-6)
    _forget()


def test_nvidias_without_kernels(install: Install) -> None:
    install(NVIDIA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apex.find_apex() is None
    assert apex.describe() == (
        "apex: not used, NVIDIA's is installed without its CUDA kernels (multi_tensor_adam: No module named 'amp_C'; "
        "fused_layer_norm_affine: No module named 'fused_layer_norm_cuda')"
    )


def test_nvidias_with_one_kernel(install: Install, as_if_on_gpu: None) -> None:
    install(NVIDIA | {"fused_layer_norm_cuda.py": ""})
    found = apex.find_apex()
    assert found is not None and found.adam is None and found.norm is not None
    assert apex.describe() == (
        "apex: NVIDIA's of unknown version, layer_norm (without multi_tensor_adam: No module named 'amp_C')"
    )
    with pytest.raises(RuntimeError, match="apex adamw: multi_tensor_adam: No module named 'amp_C'; build it"):
        apex.adamw_step(*(torch.zeros(4) for _ in range(4)), None, AdamWStep(lr=0.1))


def test_only_on_cuda(install: Install) -> None:
    install(NVIDIA | KERNELS)
    assert apex.describe() == "apex: NVIDIA's of unknown version, layer_norm, adamw"
    with pytest.raises(ValueError, match="apex adamw: runs on CUDA only, and the tensor is on cpu"):
        apex.adamw_step(*(torch.zeros(4) for _ in range(4)), None, AdamWStep(lr=0.1))
    with pytest.raises(ValueError, match="apex layer_norm: runs on CUDA only"):
        apex.layer_norm(torch.ones(2, 3), torch.ones(3), torch.zeros(3), 1e-6)


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1 / 1024])
def test_adamw_follows_the_reference(
    install: Install, as_if_on_gpu: None, grad_type: torch.dtype, scale: float
) -> None:
    install(NVIDIA | KERNELS)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(100, generator=generator), torch.zeros(100), torch.zeros(100)]
    results = []
    for step_with in (apex.adamw_step, reference_step):
        weight, moment, square = (t.clone() for t in start)
        model = torch.empty(100, dtype=torch.bfloat16)
        for step in range(1, 5):
            grad = torch.randn(100, generator=torch.Generator().manual_seed(step)).to(grad_type) / scale
            before = grad.clone()
            numbers = AdamWStep(lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6, step=step, grad_scale=scale)
            step_with(weight, grad, moment, square, model, numbers)
            assert torch.equal(grad, before)
        results.append((weight, moment, square, model.float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adamw_checks_its_arrays(install: Install, as_if_on_gpu: None) -> None:
    install(NVIDIA | KERNELS)
    arrays = [torch.zeros(4) for _ in range(4)]
    with pytest.raises(ValueError, match="moment: must be fp32"):
        apex.adamw_step(arrays[0], arrays[1], arrays[2].half(), arrays[3], None, AdamWStep(lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(install: Install, as_if_on_gpu: None, dtype: torch.dtype) -> None:
    install(NVIDIA | KERNELS)
    x, weight, bias = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(8), torch.randn(8)
    y = apex.layer_norm(x, weight, bias, 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.layer_norm(x.float(), (8,), weight, bias, 1e-6).to(dtype))
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.gpu
def test_the_real_one() -> None:
    apex._find.cache_clear()
    found = apex.find_apex()
    if found is None or found.adam is None or found.norm is None:
        pytest.skip(apex.describe())
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((70, 384), (384,), (384,)))
    y = apex.layer_norm(x.to(device), w.to(device), b.to(device), 1e-6)
    torch.testing.assert_close(y.cpu(), F.layer_norm(x, (384,), w, b, 1e-6), rtol=1e-5, atol=1e-5)
    results = []
    for step_with, where in ((apex.adamw_step, device), (reference_step, torch.device("cpu"))):
        arrays = [t.clone().to(where) for t in (w, b, torch.zeros(384), torch.zeros(384))]
        step_with(*arrays, None, AdamWStep(lr=0.01, weight_decay=0.1, grad_scale=0.5))
        results.append([t.cpu() for t in arrays])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
