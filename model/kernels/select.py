"""Which form of each kernel runs: `Kernels` is made once from the configuration and handed down."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import attention, checks, native, norms, reference  # noqa: F401  (they define the operators)

Backend = Literal["auto", "native", "reference"]
BACKENDS = ("auto", "native", "reference")


@dataclass(frozen=True)
class Kernels:
    """The kernels under one choice of backend.

    `native` is the compiled form, an error where it cannot run; `reference` is plain PyTorch; `auto` is native where it
    can run (module
    built for the tensor's device, element type fp32, bf16 or fp16) and the reference elsewhere.
    """

    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"kernels: '{self.backend}' is not one of {', '.join(BACKENDS)}")

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> Tensor:
        """LayerNorm over the last dimension. x: [..., D]; weight, bias: [D] or None -> [..., D] of out_dtype (default:
        x's).

        memory_efficient keeps the output, which the next layer keeps anyway, instead of the input for the backward pass
        (native only;
        weights must not be close to zero). Raises ValueError naming the argument.
        """
        checks.norm_input(x, weight, bias, eps)
        dtype = checks.out_dtype(x, out_dtype)
        if self._native(x, weight, bias, out=dtype):
            return torch.ops.vitruvius.norm(x, None, weight, bias, eps, False, dtype, memory_efficient)[0]
        return reference.layer_norm(x, weight, bias, eps, dtype)

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> Tensor:
        """RMSNorm over the last dimension; arguments as for layer_norm."""
        checks.norm_input(x, weight, bias, eps)
        dtype = checks.out_dtype(x, out_dtype)
        if self._native(x, weight, bias, out=dtype):
            return torch.ops.vitruvius.norm(x, None, weight, bias, eps, True, dtype, memory_efficient)[0]
        return reference.rms_norm(x, weight, bias, eps, dtype)

    def add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """s = x + residual and LayerNorm(s) in one pass: returns (norm, s). x, residual: [..., D] of one dtype."""
        return self._add_norm(x, residual, weight, bias, eps, False, out_dtype, memory_efficient)

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """s = x + residual and RMSNorm(s) in one pass: returns (norm, s). x, residual: [..., D] of one dtype."""
        return self._add_norm(x, residual, weight, bias, eps, True, out_dtype, memory_efficient)

    def _add_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        out_dtype: torch.dtype | None,
        memory_efficient: bool,
    ) -> tuple[Tensor, Tensor]:
        checks.norm_input(x, weight, bias, eps)
        checks.like("residual", residual, "x", x)
        dtype = checks.out_dtype(x, out_dtype)
        if self._native(x, residual, weight, bias, out=dtype):
            return torch.ops.vitruvius.norm(x, residual, weight, bias, eps, rms, dtype, memory_efficient)[:2]
        total = x + residual
        return (reference.rms_norm if rms else reference.layer_norm)(total, weight, bias, eps, dtype), total

    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_map: str = "elu",
        eps: float = 1e-6,
        *,
        power: int = 3,
        conv_weight: Tensor | None = None,
        conv_bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attention without softmax or mask, in time and memory linear in N. q, k: [B, H, N, K]; v: [B, H, N, M] -> [B,
        H, N, M].

        feature_map: `elu` (elu + 1), `relu` or `focused` (with `power`). With conv_weight [M, s, s] (s odd) a
        depth-wise convolution
        of v over the token grid (h, w) is added, which touches only the last h*w tokens: prefix tokens are unchanged by
        it.
        """
        checks.attention_input(q, k, v, feature_map, power)
        if self._native(q, k, v):
            out = torch.ops.vitruvius.linear_attention(q, k, v, feature_map, power, eps)[0]
        else:
            out = reference.linear_attention(q, k, v, feature_map, power, eps)
        if conv_weight is None:
            return out
        return out + reference.depthwise_conv(v, conv_weight, conv_bias, checks.conv(v, conv_weight, conv_bias, grid))

    def _native(self, x: Tensor, *others: Tensor | None, out: torch.dtype | None = None) -> bool:
        """Whether the compiled form serves these tensors; with backend `native`, a ValueError where it does not."""
        if self.backend == "reference":
            return False
        problem = self._obstacle(x, *others, out=out)
        if problem and self.backend == "native":
            raise ValueError(f"{problem}; kernels 'auto' or 'reference' run it in plain PyTorch")
        return problem is None

    @staticmethod
    def _obstacle(x: Tensor, *others: Tensor | None, out: torch.dtype | None) -> str | None:
        if native.module_for(x.device) is None:
            return f"x: {native.why_missing(x.device)}"
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
        if module is None:
            return [f"kernels: reference (plain PyTorch): {native.why_missing(device)}"]
        return [f"kernels: native {device.type}, {_detail(device)}", f"  live: {', '.join(NATIVE_OPS)}"]


NATIVE_OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "linear_attention")


def _detail(device: torch.device) -> str:
    if device.type == "cpu" and native.cpu is not None:
        return f"{native.cpu.instruction_set()} on {torch.get_num_threads()} threads of {native.cpu.threading()}"
    assert native.cuda is not None
    return f"compiled for {native.cuda.architectures()}"
