"""Products of 8-bit matrices: the emulation against float64 and torch._scaled_mm, CUDA's rules, devices."""

import pytest
import torch
from torch import Tensor

from parallel.fp8 import NativeBackend, fp8_means, fp8_obstacle, matmul, quantise
from parallel.fp8.matmul import FLOAT8, emulated_matmul

E4M3, E5M2 = FLOAT8
ONE = torch.ones(1)
PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=["e4m3-e4m3", "e5m2-e4m3", "e4m3-e5m2"])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _operands(pair: tuple[torch.dtype, torch.dtype], m: int = 48, k: int = 64, n: int = 32) -> tuple[Tensor, Tensor]:
    return _random(m, k).mul_(30).to(pair[0]), _random(n, k, seed=1).to(pair[1]).t()


@each_pair
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_emulation_is_exact_up_to_fp32_sums(pair: tuple[torch.dtype, torch.dtype], out: torch.dtype) -> None:
    a, b = _operands(pair)
    factors = torch.tensor([0.37]), torch.tensor([2.1])
    exact = (a.double() @ b.double()) * factors[0].double() * factors[1].double()
    size = (a.double().abs() @ b.double().abs()) * factors[0].double() * factors[1].double()
    ours = matmul(a, b, *factors, out)
    assert ours.dtype == out
    bound = (64 + 4) * 2.0**-24 * size + torch.finfo(out).eps / 2 * exact.abs()
    assert ((ours.double() - exact).abs() <= bound).all()


@each_pair
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_emulation_equals_torchs_own(pair: tuple[torch.dtype, torch.dtype], out: torch.dtype) -> None:
    a, b = _operands(pair, k=256)
    factors = torch.tensor([0.5]), torch.tensor([0.25])
    theirs = torch._scaled_mm(a, b, *factors, out_dtype=out)
    ours = emulated_matmul(a, b, *factors, out)
    size = (a.double().abs() @ b.double().abs()) / 8
    rounding = 2 * torch.finfo(out).eps * ours.double().abs() if out != torch.float32 else 0
    assert ((ours.double() - theirs.double()).abs() <= 256 * 2.0**-23 * size + rounding).all()
    small = torch.ones(16, 16).to(pair[0]), torch.ones(16, 16).to(pair[1]).t()  # sums without rounding: bit for bit
    assert torch.equal(torch._scaled_mm(*small, *factors, out_dtype=out), emulated_matmul(*small, *factors, out))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(16, 16).to(E5M2), torch.zeros(16, 16).to(E5M2).t(), "e5m2 x e5m2"),
        (torch.zeros(16, 16).to(E4M3), torch.zeros(16, 16).to(E4M3), "column-major"),
        (torch.zeros(16, 16).to(E4M3).t(), torch.zeros(16, 16).to(E4M3).t(), "row-major"),
        (torch.zeros(16, 24).to(E4M3), torch.zeros(16, 24).to(E4M3).t(), "row-major"),
        (torch.zeros(16, 16).to(E4M3), torch.zeros(8, 16).to(E4M3).t(), "multiples of 16"),
        (torch.zeros(16, 16), torch.zeros(16, 16).to(E4M3).t(), "float32"),
    ],
)
def test_cudas_rules_hold_on_a_cpu(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        matmul(a, b, ONE, ONE, torch.float32)
    good = torch.zeros(16, 16).to(E4M3)
    with pytest.raises(AssertionError):
        matmul(good, good.t(), ONE.double(), ONE, torch.float32)


@pytest.mark.parametrize("sizes", [(16, 32, 48), (5, 17, 33), (1, 3, 2)])
def test_three_products_of_a_linear(sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    backend, eighth = NativeBackend(torch.device("cpu")), torch.tensor([8.0])
    x, w, g = _random(rows, inputs), _random(outputs, inputs, seed=1), _random(rows, outputs, seed=2)
    x8, w8 = (quantise(t, eighth, E4M3)[0] for t in (x, w))
    g8 = quantise(g, eighth, E5M2)[0]
    xd, wd, gd = (t.mul(8).to(q.values.dtype).double() / 8 for t, q in ((x, x8), (w, w8), (g, g8)))
    for ours, exact in (
        (backend.forward(x8, w8, torch.float32), xd @ wd.t()),
        (backend.input_gradient(g8, w8, torch.float32), gd @ wd),
        (backend.weight_gradient(g8, x8, torch.float32), gd.t() @ xd),
    ):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_nan_or_infinity_reaches_every_product() -> None:
    backend, good = NativeBackend(torch.device("cpu")), torch.ones(16, 16)
    for value in (float("nan"), float("inf")):
        bad = good.clone()
        bad[1, 2] = value
        for a, b in ((good, bad), (bad, good)):
            a8, b8 = (quantise(t, ONE, E4M3)[0] for t in (a, b))
            for product in (backend.forward, backend.input_gradient, backend.weight_gradient):
                assert not product(a8, b8, torch.bfloat16).isfinite().any()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert fp8_obstacle(torch.device("cpu")) is None and fp8_means(torch.device("cpu")) == "emulated"
    assert "no FP8" in (fp8_obstacle(torch.device("mps")) or "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in")
    for capability, able in (((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32"), ((8, 9), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found = fp8_obstacle(cuda)
        if able is None:
            assert found is None
        else:
            wanted = f"cuda:0 (Stand-in, compute capability {capability[0]}.{capability[1]}) has no FP8 matrix units"
            assert found is not None and found.startswith(wanted) and f"use {able}" in found
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "AMD" in (fp8_obstacle(cuda) or "")


@pytest.mark.gpu
@each_pair
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_hardware_equals_emulation(pair: tuple[torch.dtype, torch.dtype], out: torch.dtype) -> None:
    device = torch.device("cuda")
    if reason := fp8_obstacle(device):
        pytest.skip(reason)
    a, b = _operands(pair, 128, 512, 96)
    factors = torch.tensor([0.37]), torch.tensor([2.1])
    exact = emulated_matmul(a, b, *factors, torch.float64)
    size = (a.double().abs() @ b.double().abs()) * 0.37 * 2.1
    on_gpu = [t.to(device) for t in (a, b, *factors)]
    for fast in (False, True):
        theirs = matmul(*on_gpu, out, fast=fast).cpu().double()
        # Hopper sums products of 8-bit numbers with about 14 bits, in fp32 only where it is asked for accuracy
        bound = (2.0**-10 if fast else 2.0**-13) * size + torch.finfo(out).eps * exact.abs()
        assert ((theirs - exact).abs() <= bound).all()
    bad = torch.full((1,), float("nan"), device=device)
    assert matmul(on_gpu[0], on_gpu[1], bad, on_gpu[3], out).isnan().all()
