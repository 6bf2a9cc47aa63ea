"""The CPU module itself: instruction sets, results larger than the caches, the allocator."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.kernels import AdamWStep, native, tune_allocator
from tests.model.kernels.kernel_cases import NATIVE, assert_same, needs_cpu_module, randn

pytestmark = needs_cpu_module
ROOT = Path(__file__).resolve().parents[3]

BEST = "" if native.cpu is None else native.cpu.instruction_set()
OTHERS = [] if native.cpu is None else [isa for isa in native.cpu.instruction_sets() if isa != BEST]


@pytest.mark.parametrize("isa", OTHERS)
def test_the_other_instruction_sets(isa: str) -> None:
    """All kernel tests once more: the choice is made once, when the module is loaded, so in a process of its own."""
    tests = ["-k", "not other_instruction and not compile and not registration and not tune_allocator and not cuda"]
    tests += [f"--ignore={Path(__file__).parent / 'test_memory.py'}"]  # knows no instruction
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parent), *tests],
        env=os.environ | {"VITRUVIUS_ISA": isa},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    named = [sys.executable, "-c", "from model.kernels import native; print(native.cpu.instruction_set())"]
    live = subprocess.run(named, env=os.environ | {"VITRUVIUS_ISA": isa}, capture_output=True, text=True, cwd=ROOT)
    assert live.stdout.strip() == isa, live.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow: the output cast alone (subnormal bf16 apart: see docs/kernels.md)."""
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 1e6, 6e-8, 3e-8, 2.9e-8, 1e-5, 0.0])
    values = torch.cat([torch.linspace(-3, 3, 4097), edges])
    # rstd is exactly 0 for an infinite eps, so y = bias
    y = NATIVE.rms_norm(values.repeat(2, 1), torch.ones_like(values), values, eps=float("inf"), out_dtype=dtype)
    assert torch.equal(y[0], values.to(dtype))


def large(op: str, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and input gradient of `op`."""
    x = x.detach().requires_grad_()
    y = {
        "layer_norm": NATIVE.layer_norm,
        "bias_gelu": NATIVE.bias_gelu,
        "add_rms_norm": lambda t: NATIVE.add_rms_norm(t, grad)[0],
    }[op](x)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm", "bias_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_outgrows_the_caches(op: str, dtype: torch.dtype) -> None:
    """Large results are written past the caches: bit for bit the same rows as in small parts."""
    rows = (33 << 20) // (1024 * dtype.itemsize)
    x, grad = randn(rows, 1024, dtype=dtype), randn(rows, 1024, dtype=dtype, seed=1)
    whole = large(op, x, grad)
    parts = [large(op, x[i : i + 1000], grad[i : i + 1000]) for i in range(0, rows, 1000)]
    assert_same(whole, [torch.cat(p) for p in zip(*parts, strict=True)])


def test_adamw_past_the_caches() -> None:
    size = (3 << 20) + 4099
    state = [randn(size, seed=i).abs() for i in range(4)]
    model = torch.empty(size, dtype=torch.bfloat16)
    step = AdamWStep(lr=0.1, weight_decay=0.1, step=3)
    in_parts, model_parts = [t.clone() for t in state], torch.empty_like(model)
    NATIVE.adamw(*state, model, step)
    for begin in range(0, size, 1 << 16):
        NATIVE.adamw(*(t[begin : begin + (1 << 16)] for t in in_parts), model_parts[begin : begin + (1 << 16)], step)
    assert_same([*state, model], [*in_parts, model_parts])


def test_tune_allocator_reports_success() -> None:
    program = "from model.kernels import tune_allocator; print(tune_allocator())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == str(sys.platform == "linux")


def test_tune_allocator_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu", None)
    assert tune_allocator() is False


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)])
def test_a_gpu_older_than_the_code(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """`auto` must not launch what the GPU has no code for."""
    monkeypatch.setattr(native, "cuda", SimpleNamespace(architectures=lambda: "sm_80, sm_90a"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    native._too_old.cache_clear()
    request.addfinalizer(native._too_old.cache_clear)
    gpu = torch.device("cuda", 0)
    assert (native.module_for(gpu) is native.cuda) == runs
    if not runs:
        assert "compiled for sm_80, sm_90a, and this GPU is sm_75" in native.why_missing(gpu)
