"""Which device a rank takes, and how fp32 products are taken there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine import device
from engine.config import PrecisionConfig
from engine.device import choose_device, peak_tflops, set_matmul
from engine.errors import ConfigError
from parallel.process_group import World

THIRD = World(rank=2, size=4, local_rank=2, local_size=4)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Say how many GPUs this process sees by changing the first number; the second is that of the chosen one."""
    seen = [4, -1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: seen.__setitem__(1, chosen.index))
    yield seen


def test_each_local_rank_takes_the_gpu_of_its_number(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto", THIRD) == torch.device("cuda", 2)
    gpus[0] = 1
    with pytest.raises(ConfigError, match=r"local rank 2 .* sees 1; .* --gpus-per-node"):
        choose_device("cuda", THIRD)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")  # each task sees its own alone
    assert choose_device("cuda", THIRD) == torch.device("cuda", 0)
    assert gpus[1] == 0


@pytest.fixture
def kept_settings() -> Iterator[None]:
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.parametrize(("vendor", "library"), [("AuthenticAMD", "onednn"), ("GenuineIntel", "mkl"), ("", "mkl")])
def test_the_library_of_products(
    vendor: str, library: str, kept_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_field", lambda name: {"vendor_id": vendor}[name])
    assert set_matmul(PrecisionConfig(), torch.device("cpu")) == library
    assert torch.get_float32_matmul_precision() == ("high" if library == "onednn" else "highest")
    assert set_matmul(PrecisionConfig(cpu_matmul="mkl"), torch.device("cpu")) == "mkl"


def test_no_tf32_on_a_gpu(kept_settings: None) -> None:
    set_matmul(PrecisionConfig(), torch.device("cuda"))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"  # torch refuses to answer where settings are at odds


@pytest.mark.parametrize(
    ("name", "fp32", "bf16", "fp8"),
    [
        ("NVIDIA A100-SXM4-40GB", 19.5, 312, None),
        ("NVIDIA A100-SXM4-80GB", 19.5, 312, None),
        ("NVIDIA A100-PCIE-40GB", 19.5, 312, None),
        ("NVIDIA A100 80GB PCIe", 19.5, 312, None),
        ("NVIDIA H100 80GB HBM3", 66.9, 989, 1979),
        ("NVIDIA H100 PCIe", 51.2, 756, 1513),
        ("NVIDIA H100 NVL", 60, 835, 1671),
        ("NVIDIA H200", 66.9, 989, 1979),
        ("NVIDIA H200 NVL", 60, 835, 1671),
        ("NVIDIA L40S", 91.6, 362, 733),
        # not listed: a part of a board, other boards whose names hold a listed one, and what is not known here
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None, None),
        ("NVIDIA RTX A1000", None, None, None),
        ("NVIDIA RTX A1000 6GB Laptop GPU", None, None, None),
        ("NVIDIA A100X", None, None, None),
        ("NVIDIA A10", None, None, None),
        ("NVIDIA L40", None, None, None),
        ("NVIDIA GeForce RTX 4090", None, None, None),
        ("Tesla V100-SXM2-32GB", None, None, None),
        ("AMD Instinct MI300X", None, None, None),
        ("", None, None, None),
    ],
)
def test_peak_rates_are_of_the_very_board(
    name: str, fp32: float | None, bf16: float | None, fp8: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert [peak_tflops(gpu, dtype) for dtype in ("fp32", "bf16", "fp16", "fp8")] == [fp32, bf16, bf16, fp8]
    assert peak_tflops(torch.device("cpu"), "bf16") is None
