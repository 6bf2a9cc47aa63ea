"""The device of this rank: which, how many threads, which matrix library, how fast it could be, how much memory it
took.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.precision.config import PrecisionConfig
from model.kernels import pool_state, tune_allocator
from parallel.process_group import World

# Dense peak of matrix products in TFLOP/s without sparsity, from the vendors' data sheets; fp32 without TF32.
_A100 = {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0}
_H100_SXM = {"fp32": 66.9, "bf16": 989.0, "fp16": 989.0, "fp8": 1979.0}
_H100_NVL = {"fp32": 60.0, "bf16": 835.0, "fp16": 835.0, "fp8": 1671.0}
_PEAK_TFLOPS = {  # by the whole name that the driver gives: boards of one chip differ, and a slice (MIG) is part of one
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": {"fp32": 51.2, "bf16": 756.0, "fp16": 756.0, "fp8": 1513.0},
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA L40S": {"fp32": 91.6, "bf16": 362.0, "fp16": 362.0, "fp8": 733.0},
}


def choose_device(wanted: str, world: World) -> torch.device:
    """The device of this rank; each local rank takes the GPU of its number, or the only one that SLURM shows its task
    (`--gpus-per-task 1`).

    Raises:
        ConfigError: CUDA is asked for where there is none, or a host has more ranks than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here: use device auto or cpu")
    count = torch.cuda.device_count()
    own = 0 if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ else world.local_rank
    if own >= count:
        raise ConfigError(
            f"local rank {own} has no GPU of its own: this process sees {count}; start one rank per GPU (srun: "
            "--gpus-per-node with as many as tasks), or use device cpu"
        )
    device = torch.device("cuda", own)
    torch.cuda.set_device(device)
    return device


def prepare_cpu(world: World) -> int:
    """Share this host's cores among its ranks, unless OMP_NUM_THREADS says otherwise, and keep freed memory at hand.

    Returns threads per rank.
    """
    tune_allocator()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    return torch.get_num_threads()


def set_matmul(config: PrecisionConfig, device: torch.device) -> str:
    """Have fp32 products taken in full fp32, without TF32; returns the library that takes them.

    On a CPU torch's precision "high" means oneDNN, which without TF32 units keeps full fp32 accuracy and is over twice
    as fast as MKL on AMD processors with AVX2; "medium" would round to bf16 where the processor can, and is never used.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # convolutions have a switch of their own, which is on
        return "cublas"
    wanted = config.cpu_matmul
    if wanted == "auto":
        wanted = "onednn" if _cpu_field("vendor_id") == "AuthenticAMD" else "mkl"
    torch.set_float32_matmul_precision("high" if wanted == "onednn" else "highest")
    return wanted


def processor(device: torch.device) -> str:
    """Its name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_field("model name") or "CPU"


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1] for line in lines if line.startswith(name)), "").strip()


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """The device's peak for matrix products of `dtype`, None where unknown (any CPU, and GPUs not listed here)."""
    return _PEAK_TFLOPS.get(torch.cuda.get_device_name(device), {}).get(dtype) if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage also counts what the parent held when it forked
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes(device: torch.device) -> int:
    """All memory of the GPU, or of this host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_share(device: torch.device, world: World) -> float:
    """Bytes that this rank may count on: its GPU's, or its share of the host's."""
    return memory_bytes(device) / (1 if device.type == "cuda" else world.local_size)


def synchronise(device: torch.device) -> None:
    """Wait until all work on the device is done (a CPU has none outstanding)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """For the start-up report."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, NCCL"
    return f"CPU, gloo, tensors from {pool_state()}"
