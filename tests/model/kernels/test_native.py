"""The CPU module itself: instruction sets and the allocator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.kernels import native, tune_allocator
from tests.model.kernels.kernel_cases import needs_cpu_module

pytestmark = needs_cpu_module
ROOT = Path(__file__).resolve().parents[3]

# Each instruction set in a process of its own, since the choice is made once when the module is loaded.
PROGRAM = """
import torch
from model.kernels import Kernels, native
assert native.cpu.instruction_set() == "{isa}"
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for dim in (3, 17, 64, 203):
        x = torch.randn(9, dim, dtype=torch.float64).to(dtype)
        x[0, 0] = 3e-40
        w, b, grad = torch.randn(dim), torch.randn(dim), torch.randn(9, dim).to(dtype)
        results = []
        for kernels, cast in ((Kernels("native"), lambda t: t), (Kernels("reference"), lambda t: t.double())):
            leaves = [cast(t).detach().requires_grad_() for t in (x, w, b)]
            y = kernels.layer_norm(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, cast(grad))])
        for got, exact in zip(*results):
            limit = (16 if got.dtype == torch.float32 else 1) * torch.finfo(got.dtype).eps * exact.abs().max()
            assert (got.double() - exact).abs().max() <= limit
    nan = torch.full((2, 40), float("nan"), dtype=dtype)
    assert Kernels("native").layer_norm(nan).isnan().all()
# Rounding of ties, subnormals, overflow: the output cast alone, bit for bit as torch's (subnormal bf16 apart: see
# docs/kernels.md).
values = torch.cat([torch.linspace(-3, 3, 4097), torch.tensor([65504.0, 65519.9, 65520.0, 1e6, 6e-8, 3e-8, 2.9e-8, 1e-5,
0.0])])
x = values.repeat(2, 1)
ones = torch.ones(values.numel())
for dtype in (torch.bfloat16, torch.float16):
    # rstd is exactly 0 for an infinite eps, so y = bias
    y = Kernels("native").rms_norm(x, ones, values, eps=float("inf"), out_dtype=dtype)
    assert torch.equal(y[0], values.to(dtype)), dtype
print("passed")
"""


@pytest.mark.parametrize("isa", [] if native.cpu is None else native.cpu.instruction_sets())
def test_each_instruction_set(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(isa=isa)],
        env=os.environ | {"VITRUVIUS_ISA": isa},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.stdout.strip() == "passed", run.stderr


def test_tune_allocator_reports_success() -> None:
    program = "from model.kernels import tune_allocator; print(tune_allocator())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == str(sys.platform == "linux")


def test_tune_allocator_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu", None)
    assert tune_allocator() is False
