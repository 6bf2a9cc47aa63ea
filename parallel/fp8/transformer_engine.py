"""NVIDIA Transformer Engine (2.x) as an optional backend: its cast kernels and its matrix product, our scales.

Its cast reads x once for amax, 8-bit values and their transpose, where ours takes several passes; that is why it is
taken where it is installed. Scales, histories and reductions stay with parallel.fp8.state for either backend, so
checkpoints and numbers do not depend on which is used.

What has never run on a GPU: everything here that calls Transformer Engine. The names and argument orders are those of
its sources (`pytorch/tensor/float8_tensor.py`, `pytorch/cpp_extensions/gemm.py`, 2.0 to 2.9); the tests use a stand-in
of the same signatures. Run tests/parallel/fp8 with `-m gpu` on a machine that has it before trusting it.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.fp8.matmul import fp8_obstacle
from parallel.fp8.quantise import Quantised, aligned

_HOW_TO_INSTALL = "install it with `pip install --no-build-isolation transformer_engine[pytorch]`"


@dataclass(frozen=True)
class Symbols:
    """The parts of Transformer Engine that are used.

    Attributes:
        version: as the package says. quantizer: Float8Quantizer(scale, amax, dtype, rowwise=, columnwise=).
        gemm: general_gemm. dtypes: its name of each 8-bit format. workspace: makes the scratch memory that
            general_gemm was given until 2.8; None for versions that have their own.
    """

    version: str
    quantizer: Any
    gemm: Any
    dtypes: dict[torch.dtype, Any]
    workspace: Any


def find() -> Symbols:
    """Transformer Engine's symbols.

    Raises:
        ImportError: it is not there, cannot be loaded, or lacks a symbol.
    """
    found = _import()
    if isinstance(found, str):
        raise ImportError(found)
    return found


def obstacle(device: torch.device) -> str | None:
    """Why Transformer Engine cannot be used on `device`, with the cure; None if it can."""
    if device.type != "cuda":
        return f"Transformer Engine runs on NVIDIA GPUs only, and the device is {device}: use a GPU"
    found = _import()
    return fp8_obstacle(device) if isinstance(found, Symbols) else found


@cache
def _import() -> Symbols | str:
    """The symbols, or why they cannot be had. The leaf modules themselves, since what the top re-exports has moved."""
    version = "of unknown version"
    try:
        version = str(getattr(importlib.import_module("transformer_engine"), "__version__", version))
        tex = importlib.import_module("transformer_engine_torch")
        gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm").general_gemm
        quantizer = importlib.import_module("transformer_engine.pytorch.tensor.float8_tensor").Float8Quantizer
        workspace = None
        if "workspace" in inspect.signature(gemm).parameters:
            workspace = importlib.import_module("transformer_engine.pytorch.module.base").get_workspace
        dtypes = {torch.float8_e4m3fn: tex.DType.kFloat8E4M3, torch.float8_e5m2: tex.DType.kFloat8E5M2}
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return f"Transformer Engine is not installed: {_HOW_TO_INSTALL}"
        return f"Transformer Engine {version} is installed without {error.name}: {_HOW_TO_INSTALL}"
    except Exception as error:  # its import also raises RuntimeError, OSError, AssertionError and AttributeError
        return f"Transformer Engine {version} cannot be loaded ({type(error).__name__}: {error}): {_HOW_TO_INSTALL}"
    return Symbols(version=version, quantizer=quantizer, gemm=gemm, dtypes=dtypes, workspace=workspace)


class TeQuantised(Quantised):
    """A Float8Tensor in the place of `values`: 8-bit values, their transpose, and the inverse scale."""

    def __init__(self, tensor: Any, shape: tuple[int, int]) -> None:
        self.tensor, self.shape = tensor, shape

    def save(self) -> tuple[Tensor | None, ...]:
        """The tensors that autograd keeps: of an input, what the product for the weight gradient reads."""
        self.tensor.update_usage(rowwise_usage=False, columnwise_usage=True)
        saved, self.tensor = self.tensor.prepare_for_saving()
        return tuple(saved)

    def restore(self, saved: tuple[Tensor | None, ...]) -> Quantised:
        """The matrix again, from what `save` gave."""
        self.tensor.restore_from_saved(list(saved))
        return self

    def emptied(self) -> Quantised:
        """Itself: `save` has emptied it."""
        return self


class TransformerEngineBackend:
    """See the module; parallel.fp8.backend.Fp8Backend says what each method does."""

    def __init__(self, symbols: Symbols, device: torch.device) -> None:
        self._te, self.device = symbols, device

    def quantise(
        self, x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None
    ) -> tuple[Quantised, Tensor]:
        """As parallel.fp8.quantise.quantise. Its kernel's amax skips NaN, but a NaN stays one in the 8-bit values."""
        rows, columns = x.shape
        padded = F.pad(x.detach(), (0, aligned(columns) - columns, 0, aligned(rows) - rows))
        seen = torch.zeros(1, device=x.device)
        quantizer = self._te.quantizer(scale.clone(), seen, self._te.dtypes[dtype], rowwise=True, columnwise=True)
        tensor = quantizer(padded.contiguous())
        amax = seen if amax is None else amax
        tensor._scale_inv.add_(amax * 0)  # NaN where there was an infinity, which the cast has clamped
        return TeQuantised(tensor, (rows, columns)), amax

    def forward(self, x: Quantised, weight: Quantised, out_dtype: torch.dtype) -> Tensor:
        """y [R, F] from x [R, D] and W [F, D]."""
        return self._product(weight, x, "TN", out_dtype, (x.shape[0], weight.shape[0]), accurate=False)

    def input_gradient(self, grad: Quantised, weight: Quantised, out_dtype: torch.dtype) -> Tensor:
        """dx [R, D] from g [R, F] and W [F, D]."""
        return self._product(weight, grad, "NN", out_dtype, (grad.shape[0], weight.shape[1]))

    def weight_gradient(self, grad: Quantised, x: Quantised, out_dtype: torch.dtype) -> Tensor:
        """dW [F, D] from g [R, F] and x [R, D]."""
        return self._product(x, grad, "NT", out_dtype, (grad.shape[1], x.shape[1]))

    def describe(self) -> str:
        """For the start-up report."""
        return f"Transformer Engine {self._te.version} on {self.device}"

    def _product(
        self, a: Quantised, b: Quantised, layout: str, dtype: torch.dtype, shape: tuple[int, int], accurate: bool = True
    ) -> Tensor:
        """general_gemm follows BLAS: column-major a and b, so its row-major result is op(b) op(a)."""
        assert isinstance(a, TeQuantised) and isinstance(b, TeQuantised)
        scratch = () if self._te.workspace is None else (self._te.workspace(),)
        y: Tensor = self._te.gemm(
            a.tensor, b.tensor, *scratch, out_dtype=dtype, layout=layout, use_split_accumulator=accurate
        )[0]
        return y[: shape[0], : shape[1]].contiguous()
