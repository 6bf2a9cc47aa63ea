"""The choice between the compiled and the plain PyTorch form of each kernel, and what the start-up report says of
it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import apex, checks, native

Backend = Literal["auto", "native", "reference", "apex"]
BACKENDS = ("auto", "native", "reference", "apex")
# Each operation and the function of the compiled module that it needs.
NATIVE_OPS = {
    "layer_norm": "layer_norm_forward",
    "rms_norm": "layer_norm_forward",
    "add_layer_norm": "layer_norm_forward",
    "add_rms_norm": "layer_norm_forward",
    "qk_norm": "qk_norm_forward",
    "bias_gelu": "gelu_forward",
    "linear_attention": "linear_attention_forward",
    "mapped_attention": "mapped_attention",
    "patch_merge": "patch_merge_forward",
    "adamw": "adamw",
}


@dataclass(frozen=True)
class Selection:
    """One choice of backend; `Kernels` adds the operations."""

    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"kernels: '{self.backend}' is not one of {', '.join(BACKENDS)}")

    def _native(self, function: str, x: Tensor, *others: Tensor | None, out: torch.dtype | None = None) -> bool:
        """Whether the module's `function` serves these tensors; under `native` a ValueError where it does not."""
        if self.backend == "reference":
            return False
        if x.is_meta and self.backend != "native":
            return False
        problem = self._obstacle(function, x, *others, out=out)
        if problem and self.backend == "native":
            raise ValueError(f"{problem}; kernels 'auto' or 'reference' run it in plain PyTorch")
        return problem is None

    def check(self, device: torch.device) -> None:
        """Raise ValueError where NVIDIA apex is asked for and cannot run."""
        if self.backend != "apex":
            return
        if device.type != "cuda":
            raise ValueError(f"kernels is apex, which runs on CUDA only, not on {device.type}: use auto")
        if apex.find_apex() is None:
            raise ValueError(f"kernels is apex, but {apex.describe()}: {apex.HOW_TO_INSTALL}, or use auto")

    def _apex(self, op: str, device: torch.device) -> bool:
        """Whether NVIDIA apex's kernel (layer_norm, adamw) is to serve tensors on `device`."""
        found = apex.find_apex() if self.backend == "apex" and device.type == "cuda" else None
        return found is not None and (found.norm if op == "layer_norm" else found.adam) is not None

    def fuses(self, op: str, device: torch.device) -> bool:
        """Whether a compiled form of `op`, ours or NVIDIA apex's, is in use on `device`."""
        return self.is_native(op, device) or self._apex(op, device)

    def is_native(self, op: str, device: torch.device) -> bool:
        """Whether `op` (a key of NATIVE_OPS) has a compiled form in use for fp32, bf16 and fp16 tensors on `device`."""
        return self.backend != "reference" and hasattr(native.module_for(device), NATIVE_OPS[op])

    @staticmethod
    def _obstacle(function: str, x: Tensor, *others: Tensor | None, out: torch.dtype | None) -> str | None:
        module = native.module_for(x.device)
        if not x.is_meta:  # there, what a kernel keeps is known without one
            if module is None:
                return f"x: {native.why_missing(x.device)}"
            if not hasattr(module, function):
                return f"{function}: the native {x.device.type} module has no such kernel"
        for t in (x, *others):
            if t is not None and t.dtype not in native.DTYPE_CODE:
                return f"dtype: {t.dtype} has no native kernel, only {checks.FLOATS} have"
        if out is not None and (out not in native.DTYPE_CODE or {x.dtype, out} == {torch.bfloat16, torch.float16}):
            return f"out_dtype: there is no native kernel from {x.dtype} to {out}"
        return None

    def describe(self, device: torch.device | None = None) -> list[str]:
        """Lines for the start-up report: which form is live on `device` (default: cpu), on what, and why not the native
        one."""
        device = device or torch.device("cpu")
        if self.backend == "reference":
            return ["kernels: reference (plain PyTorch), as asked"]
        module = native.module_for(device)
        optional = [f"  {apex.describe()}"] if self.backend == "apex" else []
        if module is None:
            return [f"kernels: reference (plain PyTorch): {native.why_missing(device)}", *optional]
        live = [op for op, function in NATIVE_OPS.items() if hasattr(module, function)]
        missing = [op for op in NATIVE_OPS if op not in live]
        rest = [f"  reference (no native kernel on {device.type}): {', '.join(missing)}"] if missing else []
        return [f"kernels: native {device.type}, {_detail(device)}", f"  live: {', '.join(live)}", *rest, *optional]


def _detail(device: torch.device) -> str:
    if device.type == "cpu" and native.cpu is not None:
        return f"{native.cpu.instruction_set()} on {torch.get_num_threads()} threads of {native.cpu.threading()}"
    assert native.cuda is not None
    return f"compiled for {native.cuda.architectures()}"
