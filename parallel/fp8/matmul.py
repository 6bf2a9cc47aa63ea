"""One product of 8-bit matrices: on the matrix units of a GPU (`torch._scaled_mm`), exactly emulated on a CPU.

cuBLAS wants the first operand row-major, the second column-major, K and N divisible by 16, one e4m3 operand at least,
and inverse scales as fp32 tensors. torch's CPU version takes much more, so these rules are asserted here, on every
device: what passes on a laptop runs on a Hopper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.fp8.quantise import ALIGN

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def fp8_obstacle(device: torch.device) -> str | None:
    """Why products of 8-bit matrices cannot be done on `device`, with what it can do instead; None if they can.

    A CPU can: there they are emulated (`fp8_means`), which is for numerics, not for speed.
    """
    if device.type in ("cpu", "meta"):  # meta: to plan memory
        return None
    if device.type != "cuda":
        return f"{device} has no FP8 matrix products in torch: use bf16 or fp32, or the CPU, where they are emulated"
    if torch.version.hip is not None:
        return f"{device} is an AMD GPU, whose 8-bit formats differ from NVIDIA's e4m3fn: use bf16"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    able = "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
    return (
        f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor}) has no FP8 matrix units, "
        f"which come with 8.9 (Ada, Hopper, Blackwell): use {able}, which it has"
    )


def fp8_means(device: torch.device) -> str:
    """How products are done on a device without obstacle: "emulated" or "torch._scaled_mm"."""
    return "emulated" if device.type == "cpu" else "torch._scaled_mm"


def matmul(
    a: Tensor, b: Tensor, factor_a: Tensor, factor_b: Tensor, out_dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """(a b) * factor_a * factor_b, summed up in fp32.

    Args:
        a: [M, K] row-major, 8-bit. b: [K, N] column-major, 8-bit; K and N multiples of 16; not both e5m2.
        factor_a, factor_b: inverse scales, fp32 [1]; or [M, 1] and [1, N], of rows and columns, then on a GPU to bf16.
        out_dtype: fp32, bf16 or fp16 (on a CPU also fp64).
        fast: whether Hopper may sum up with fewer bits, as is usual in forward passes. No effect on a CPU.

    Returns:
        [M, N].
    """
    _check(a, b, factor_a, factor_b)
    assert factor_a.dim() == 1 or out_dtype == torch.bfloat16 or a.device.type == "cpu", out_dtype
    if a.device.type == "cpu":
        return emulated_matmul(a, b, factor_a, factor_b, out_dtype)
    return torch._scaled_mm(a, b, factor_a, factor_b, out_dtype=out_dtype, use_fast_accum=fast)


def emulated_matmul(a: Tensor, b: Tensor, factor_a: Tensor, factor_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The same in fp32: 8-bit numbers and their products are exact there (in bf16 operands, too)."""
    return (a.float() @ b.float()).mul_(factor_a * factor_b).to(out_dtype)


def _check(a: Tensor, b: Tensor, factor_a: Tensor, factor_b: Tensor) -> None:
    assert a.dtype in FLOAT8 and b.dtype in FLOAT8, (a.dtype, b.dtype)
    assert not (a.dtype == b.dtype == torch.float8_e5m2), "e5m2 x e5m2 has no matrix unit"
    assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], (a.shape, b.shape)
    assert a.stride(1) == 1 and a.stride(0) % ALIGN == 0, f"the first operand must be row-major: {a.stride()}"
    assert b.stride(0) == 1 and b.stride(1) % ALIGN == 0, f"the second operand must be column-major: {b.stride()}"
    assert a.shape[1] % ALIGN == 0 and b.shape[1] % ALIGN == 0, f"K and N must be multiples of 16: {b.shape}"
    shapes = tuple(factor_a.shape), tuple(factor_b.shape)
    assert factor_a.dtype == factor_b.dtype == torch.float32, (factor_a.dtype, factor_b.dtype)
    assert shapes in (((1,), (1,)), ((a.shape[0], 1), (1, b.shape[1]))), shapes
