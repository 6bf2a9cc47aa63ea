"""NVIDIA apex's fused LayerNorm and AdamW, where it is installed; CUDA only.

Two packages are called apex. `pip install apex` fetches an unrelated toolkit for the Pyramid web framework; NVIDIA's
is built from its repository. They are told apart without running either: only NVIDIA's has a part `apex.normalization`.
Of NVIDIA's, leaf symbols are used alone, since larger parts (`apex.amp`, `apex.transformer`) have been removed.

What has never run on a GPU: all calls of apex's kernels. Signatures are those of its `csrc/amp_C_frontend.cpp`,
`csrc/multi_tensor_adam.cu` and `apex/normalization/fused_layer_norm.py`; the tests use stand-ins of the same.
"""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import optimizers
from .optimizers import AdamWStep

HOW_TO_INSTALL = (
    "build it in a clone of https://github.com/NVIDIA/apex with "
    "`APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .`"
)
_CHUNK = 2048 * 32  # elements per CUDA block: apex.multi_tensor_apply's choice
_DECOUPLED_DECAY = 1  # the kernel's adam_w_mode


@dataclass(frozen=True)
class Apex:
    """What of NVIDIA apex can be called.

    Attributes:
        version: of the package.
        adam: amp_C.multi_tensor_adam; None if apex was built without it.
        norm, mixed_norm: LayerNorms for parameters of the input's type, and of another; None likewise.
        missing: why what is None is missing.
    """

    version: str
    adam: Callable[..., None] | None
    norm: Callable[..., Tensor] | None
    mixed_norm: Callable[..., Tensor] | None
    missing: tuple[str, ...] = ()


def find_apex() -> Apex | None:
    """NVIDIA apex, if it is there with a CUDA kernel at least. Warns, once, if another apex is there instead."""
    found, _ = _find()
    return found


def describe() -> str:
    """A line for the start-up report."""
    found, why = _find()
    if found is None:
        return f"apex: not used, {why}"
    live = [name for name, symbol in (("layer_norm", found.norm), ("adamw", found.adam)) if symbol is not None]
    without = f" (without {'; '.join(found.missing)})" if found.missing else ""
    return f"apex: NVIDIA's {found.version}, {', '.join(live)}{without}"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, differentiable. x: [..., D]; weight, bias: [D], of one type.

    Raises:
        ValueError: x is not on a GPU. RuntimeError: apex has no such kernel here.
    """
    found = _ready("layer_norm", x)
    assert found.norm is not None and found.mixed_norm is not None
    if weight.dtype == x.dtype:
        return found.norm(x, weight, bias, x.shape[-1:], eps)
    return found.mixed_norm(x, weight, bias, x.shape[-1:], eps).to(x.dtype)  # its output has the type of weight


def adamw_step(
    weight: Tensor, grad: Tensor, moment: Tensor, square: Tensor, model_weight: Tensor | None, step: AdamWStep
) -> None:
    """One AdamW step in place over flat arrays [P], as model.kernels.optimizers.reference_step.

    The kernel takes gradients of the weight's type and scales none: a scaled or 16-bit gradient costs a copy, the
    model's own weights a second pass.

    Raises:
        ValueError: weight is not on a GPU, or arrays do not fit. RuntimeError: apex has no such kernel here.
    """
    optimizers.check(weight, grad, moment, square, model_weight, step.step)
    found = _ready("adamw", weight)
    assert found.adam is not None
    wide = grad.to(weight.dtype)
    if step.grad_scale != 1:
        wide = wide * step.grad_scale
    unused = torch.zeros(1, dtype=torch.int32, device=weight.device)  # apex's overflow flag, which this kernel ignores
    found.adam(
        _CHUNK, unused, [[wide], [weight], [moment], [square]], step.lr, *step.betas, step.eps, step.step,
        _DECOUPLED_DECAY, 1, step.weight_decay,
    )  # fmt: skip
    if model_weight is not None:
        model_weight.copy_(weight)


def _ready(op: str, x: Tensor) -> Apex:
    if not _on_gpu(x):
        raise ValueError(f"apex {op}: runs on CUDA only, and the tensor is on {x.device}")
    found, why = _find()
    if found is None or (found.norm if op == "layer_norm" else found.adam) is None:
        raise RuntimeError(f"apex {op}: {why or '; '.join(found.missing if found else ())}; {HOW_TO_INSTALL}")
    return found


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@cache
def _find() -> tuple[Apex | None, str]:
    """Apex, or None and why, as the end of a sentence."""
    spec = find_spec("apex")  # finds the package, runs nothing of it
    if spec is None:
        return None, "not installed"
    if not _is_nvidias(spec):
        where = spec.origin or ", ".join(spec.submodule_search_locations or ())
        warnings.warn(
            f"the installed `apex` ({where}) is not NVIDIA's and is ignored: it has no `apex.normalization`. The "
            f"package of that name on PyPI is a web toolkit; `pip uninstall apex`, and if you want NVIDIA's, "
            f"{HOW_TO_INSTALL}",
            stacklevel=3,
        )
        return None, f"the installed package of that name ({where}) is not NVIDIA's"
    missing: list[str] = []
    adam = _load("amp_C", ("multi_tensor_adam",), missing, needs=("apex.optimizers", "FusedAdam"))
    names = ("fused_layer_norm_affine", "mixed_dtype_fused_layer_norm_affine")
    norms = _load("apex.normalization.fused_layer_norm", names, missing, needs=("fused_layer_norm_cuda", None))
    if adam is None and norms is None:
        return None, f"NVIDIA's is installed without its CUDA kernels ({'; '.join(missing)})"
    norm, mixed_norm = norms or (None, None)
    return Apex(_version(), adam[0] if adam else None, norm, mixed_norm, tuple(missing)), ""


def _is_nvidias(spec: ModuleSpec) -> bool:
    folders = spec.submodule_search_locations
    return folders is not None and PathFinder.find_spec("apex.normalization", list(folders)) is not None


def _load(
    module: str, names: tuple[str, ...], missing: list[str], needs: tuple[str, str | None]
) -> tuple[Any, ...] | None:
    """Symbols of a module that works only together with another; None, and why in `missing`, if one is not there."""
    try:
        other = importlib.import_module(needs[0])
        if needs[1] is not None:
            getattr(other, needs[1])
        loaded = importlib.import_module(module)
        return tuple(getattr(loaded, name) for name in names)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library built for another torch
        missing.append(f"{names[0]}: {error}")
        return None


def _version() -> str:
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
