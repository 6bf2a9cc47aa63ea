"""Kernels with a compiled form and a plain PyTorch form, callable one by one or through a `Kernels` that fixes the
choice.

`layer_norm` and the other functions here choose by themselves: compiled where that can run, plain PyTorch elsewhere.
"""

from .allocator import tune_allocator
from .select import Backend, Kernels

_auto = Kernels("auto")
layer_norm = _auto.layer_norm
rms_norm = _auto.rms_norm
add_layer_norm = _auto.add_layer_norm
add_rms_norm = _auto.add_rms_norm
linear_attention = _auto.linear_attention

__all__ = [
    "Backend",
    "Kernels",
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "linear_attention",
    "rms_norm",
    "tune_allocator",
]
