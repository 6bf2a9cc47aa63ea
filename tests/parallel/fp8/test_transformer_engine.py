"""The choice of a backend, and Transformer Engine's through a stand-in that has its names, signatures and layouts."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.fp8 import (
    Fp8Products,
    Fp8Recipe,
    Fp8Registry,
    NativeBackend,
    choose_backend,
    fp8_obstacle,
    matmul,
    transformer_engine,
)
from parallel.tensor import no_tensor_parallel

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class _DType:
    kFloat8E4M3, kFloat8E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class _Tensor:
    """As Float8Tensor: bytes, their transpose, and the inverse scale."""

    def __init__(self, data: Tensor, dtype: torch.dtype, scale_inv: Tensor) -> None:
        self._data: Tensor | None = data.view(torch.uint8)
        self._transpose: Tensor | None = self._data.t().contiguous()
        self._scale_inv: Tensor | None = scale_inv
        self.dtype = dtype

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        if rowwise_usage is False:
            self._data = None
        if columnwise_usage is False:
            self._transpose = None

    def prepare_for_saving(self) -> tuple[list[Tensor | None], "_Tensor"]:
        saved = [self._data, self._transpose, self._scale_inv]
        self._data = self._transpose = self._scale_inv = None
        return saved, self

    def restore_from_saved(self, saved: list[Tensor | None]) -> list[Tensor | None]:
        self._data, self._transpose, self._scale_inv = saved[:3]
        return saved[3:]


class _Quantizer:
    def __init__(
        self, scale: Tensor, amax: Tensor, fp8_dtype: torch.dtype, *, rowwise: bool = True, columnwise: bool = True
    ) -> None:
        assert rowwise and columnwise and scale.shape == amax.shape == (1,)
        self.scale, self.amax, self.dtype = scale, amax, fp8_dtype

    def __call__(self, x: Tensor) -> _Tensor:
        assert x.is_contiguous() and all(size % 16 == 0 for size in x.shape)
        torch.maximum(self.amax, x.where(~x.isnan(), 0).abs().max().float().view(1), out=self.amax)
        limit = torch.finfo(self.dtype).max
        return _Tensor((x * self.scale).clamp(-limit, limit).to(self.dtype), self.dtype, 1 / self.scale)


def _general_gemm(
    A: _Tensor, B: _Tensor, workspace: Any, out_dtype: torch.dtype, layout: str = "TN",
    use_split_accumulator: bool = False,
) -> tuple[Tensor, None, None, None]:  # fmt: skip
    """op(B) op(A) of row-major operands; a transposed read takes the transposed bytes, as on Hopper."""
    assert workspace == "scratch" and use_split_accumulator == (layout != "TN")
    left = B._data if layout[1] == "N" else B._transpose
    right = A._data if layout[0] == "T" else A._transpose
    assert left is not None and right is not None and A._scale_inv is not None and B._scale_inv is not None
    y = matmul(left.view(B.dtype), right.view(A.dtype).t(), B._scale_inv, A._scale_inv, out_dtype)
    return y, None, None, None


def _without_workspace(
    A: _Tensor, B: _Tensor, out_dtype: torch.dtype, layout: str = "TN", use_split_accumulator: bool = False
) -> tuple[Tensor, None, None, None]:
    return _general_gemm(A, B, "scratch", out_dtype, layout, use_split_accumulator)


def _modules(gemm: Any = _general_gemm) -> dict[str, ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {"__version__": "2.5.0"},
        "transformer_engine_torch": {"DType": _DType},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.cpp_extensions": {},
        "transformer_engine.pytorch.cpp_extensions.gemm": {"general_gemm": gemm},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.float8_tensor": {"Float8Quantizer": _Quantizer},
        "transformer_engine.pytorch.module": {},
        "transformer_engine.pytorch.module.base": {"get_workspace": lambda: "scratch"},
    }
    modules = {}
    for name, symbols in contents.items():
        modules[name] = ModuleType(name)
        modules[name].__dict__.update(symbols)
    return modules


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts modules where the import system finds them first; None makes a name impossible to import."""

    def put(modules: dict[str, ModuleType | None]) -> None:
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
        transformer_engine._import.cache_clear()

    transformer_engine._import.cache_clear()
    yield put
    transformer_engine._import.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def _train(backend: Any, x: Tensor, weight: Tensor, grad: Tensor, scaling: str) -> list[Tensor]:
    recipe = Fp8Recipe(scaling=scaling, history=4)  # type: ignore[arg-type]
    registry = Fp8Registry(["a"], recipe=recipe, backend=backend, device=CPU)
    products, tp, out = Fp8Products(registry.states["a"]), no_tensor_parallel(), []
    for step in range(1, 4):
        leaf, parameter = (x * step).requires_grad_(), weight.clone().requires_grad_()
        y = products.column(leaf, parameter, None, tp)
        y.backward(grad)
        assert leaf.grad is not None and parameter.grad is not None
        registry.finish_step(tp.axis)
        out += [y.detach(), leaf.grad, parameter.grad, registry.scales.clone()]
    return out


@pytest.mark.parametrize("gemm", [_general_gemm, _without_workspace], ids=["2.0", "2.9"])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_its_backend_gives_what_ours_gives(install: Any, gemm: Any, scaling: str) -> None:
    install(_modules(gemm))
    x, weight, grad = torch.randn(13, 24), torch.randn(40, 24), torch.randn(13, 40)
    backend = transformer_engine.TransformerEngineBackend(transformer_engine.find(), CPU)
    pairs = zip(
        _train(backend, x, weight, grad, scaling), _train(NativeBackend(CPU), x, weight, grad, scaling), strict=True
    )
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
    assert backend.describe() == "Transformer Engine 2.5.0 on cpu"


def test_its_amax_that_skips_nan_hides_nothing(install: Any) -> None:
    install(_modules())
    backend = transformer_engine.TransformerEngineBackend(transformer_engine.find(), CPU)
    good, one = torch.ones(16, 16), torch.ones(1)
    for bad in (float("nan"), float("inf")):
        x = good.clone()
        x[1, 2] = bad
        x8, w8 = (backend.quantise(t, one, torch.float8_e4m3fn)[0] for t in (x, good))
        assert not backend.forward(x8, w8, torch.float32)[1].isfinite().any()


def test_choice_on_a_cpu() -> None:
    assert isinstance(choose_backend("auto", CPU), NativeBackend)
    assert isinstance(choose_backend("native", CPU), NativeBackend)
    assert isinstance(choose_backend("transformer_engine", torch.device("meta")), NativeBackend), "plans know one"
    with pytest.raises(
        ValueError, match=r"fp8_backend transformer_engine: .* runs on NVIDIA GPUs only, and the device is cpu"
    ):
        choose_backend("transformer_engine", CPU)
    with pytest.raises(ValueError, match="fp8_backend is 'te': it must be auto, native, transformer_engine"):
        choose_backend("te", CPU)


def test_choice_on_a_gpu_without_the_package(install: Any, hopper: None) -> None:
    install({"transformer_engine": None})  # type: ignore[dict-item]
    assert isinstance(choose_backend("auto", CUDA), NativeBackend)
    with pytest.raises(
        ValueError, match=r"Transformer Engine is not installed: install it with .*; or use fp8_backend"
    ):
        choose_backend("transformer_engine", CUDA)
    with pytest.raises(ImportError, match="not installed"):
        transformer_engine.find()


def test_choice_on_a_gpu_with_the_package(install: Any, hopper: None) -> None:
    install(_modules())
    for wanted in ("auto", "transformer_engine"):
        backend = choose_backend(wanted, CUDA)
        assert isinstance(backend, transformer_engine.TransformerEngineBackend)
        assert backend.describe() == "Transformer Engine 2.5.0 on cuda:0"
    assert isinstance(choose_backend("native", CUDA), NativeBackend)


def test_choice_on_a_gpu_that_is_too_old(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(_modules())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in")
    for wanted in ("auto", "native", "transformer_engine"):
        with pytest.raises(ValueError, match=f"fp8_backend {wanted}: cuda:0 .Stand-in, compute capability 8.0. has no"):
            choose_backend(wanted, CUDA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_engine_torch": None}, "2.5.0 is installed without transformer_engine_torch"),
        (
            {"transformer_engine.pytorch.cpp_extensions.gemm": ModuleType("gemm")},
            "2.5.0 cannot be loaded .AttributeError",
        ),
    ],
)
def test_half_an_installation(install: Any, hopper: None, change: dict[str, ModuleType], message: str) -> None:
    install(_modules() | change)
    with pytest.raises(ValueError, match=f"fp8_backend transformer_engine: Transformer Engine {message}"):
        choose_backend("transformer_engine", CUDA)
    assert isinstance(choose_backend("auto", CUDA), NativeBackend)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_the_real_one_gives_what_ours_gives(scaling: str) -> None:
    device = torch.device("cuda", 0)
    if reason := fp8_obstacle(device) or transformer_engine.obstacle(device):
        pytest.skip(reason)
    backends = (choose_backend("transformer_engine", device), NativeBackend(device))
    x, weight, grad = (torch.randn(shape, device=device) for shape in ((45, 96), (80, 96), (45, 80)))
    recipe = Fp8Recipe(scaling=scaling, history=4)  # type: ignore[arg-type]
    found: list[list[Tensor]] = []
    for backend in backends:
        registry = Fp8Registry(["a"], recipe=recipe, backend=backend, device=device)
        products, tp = Fp8Products(registry.states["a"]), no_tensor_parallel()
        leaf, parameter = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
        y = products.column(leaf, parameter, None, tp)
        y.backward(grad.bfloat16())
        registry.finish_step(tp.axis)
        assert leaf.grad is not None and parameter.grad is not None
        found.append([y.detach(), leaf.grad, parameter.grad, registry.scales.clone()])
    for theirs, ours in zip(*found, strict=True):
        assert (theirs.float() - ours.float()).norm() <= 2e-2 * ours.float().norm()
