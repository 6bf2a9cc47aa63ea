"""The compiled modules: loading them, and what they are told about tensors (element types, thread count, stream)."""

import importlib
import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HOW_TO_BUILD = "build the kernels with `pip install -e . --no-build-isolation` in the repository root"

# The numbers are those of csrc/cpu/types.h.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module and "", or None and why it did not load."""
    try:
        return importlib.import_module(f"model.kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


# torch is imported above: its OpenMP runtime must be in the process before the CPU module looks for it, and its
# libraries before the memory module does.
cpu, cpu_error = _load("_cpu")
cuda, cuda_error = _load("_cuda")
memory, memory_error = _load("_memory")


def module_for(device: torch.device) -> ModuleType | None:
    """The compiled module that serves tensors on `device`, if there is one."""
    if device.type == "cuda":
        return None if _too_old(device.index) else cuda
    return cpu if device.type == "cpu" else None


@cache
def _too_old(index: int | None) -> str:
    """Why a GPU cannot run what was compiled, "" if it can: code for a capability runs there and on later ones."""
    if cuda is None or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    lowest = min(int(number) for number in re.findall(r"sm_(\d+)", cuda.architectures()))
    if 10 * major + minor >= lowest:
        return ""
    return f"its kernels are compiled for {cuda.architectures()}, and this GPU is sm_{major}{minor}"


def why_missing(device: torch.device) -> str:
    """Why `module_for` gave None, as the end of a sentence, with the cure where there is one."""
    error = {"cpu": cpu_error, "cuda": cuda_error or _too_old(device.index)}.get(device.type)
    if error is None:
        return f"there are no native kernels for device type '{device.type}'"
    return f"the native {device.type} module cannot be used ({error}); {HOW_TO_BUILD}"


def target(x: Tensor) -> tuple[ModuleType, int]:
    """The module for x, and where it shall run: the number of threads, or the CUDA stream."""
    module = module_for(x.device)
    if module is None:
        raise RuntimeError(f"x: {why_missing(x.device)}")
    if x.is_cuda:
        if x.device.index != torch.cuda.current_device():
            current = torch.cuda.current_device()
            raise RuntimeError(f"x: on {x.device}, but the current device is cuda:{current}; use torch.cuda.set_device")
        return module, torch.cuda.current_stream(x.device).cuda_stream
    return module, torch.get_num_threads()


def plain(t: Any) -> Any:
    """A tensor whose memory says all: no view with a sign or conjugation still to be applied, no zeros without memory.
    Anything else as it is.
    """
    if isinstance(t, Tensor):
        if t._is_zerotensor():
            return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        if t.is_neg():
            return t.resolve_neg()
    return t


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x, copied only if its rows are not evenly spaced, and the distance between rows in elements."""
    if x.is_contiguous():
        return x, x.shape[-1]
    sizes, strides = x.shape, x.stride()
    even = all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(x.dim() - 2))
    if x.dim() >= 2 and strides[-1] == 1 and even and strides[-2] >= sizes[-1]:
        return x, strides[-2]
    return x.contiguous(), x.shape[-1]


def address(t: Tensor | None) -> int:
    """Where t lies, 0 (a null pointer) for None and for what is empty."""
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def pointer(t: Tensor | None) -> tuple[int, int]:
    """Address and element type number of t."""
    return (0, 0) if t is None else (address(t), DTYPE_CODE[t.dtype])
