"""Kernels with a compiled form and a plain PyTorch form, callable one by one or through a `Kernels` that fixes the
choice.

`layer_norm` and the other functions here choose by themselves: compiled where that can run, plain PyTorch elsewhere.
"""

from .allocator import give_back, most_in_pool, pool_state, tune_allocator, use_pool
from .api import Kernels
from .optimizers import AdamWStep
from .select import Backend

_auto = Kernels("auto")
layer_norm = _auto.layer_norm
rms_norm = _auto.rms_norm
add_layer_norm = _auto.add_layer_norm
add_rms_norm = _auto.add_rms_norm
qk_norm = _auto.qk_norm
bias_gelu = _auto.bias_gelu
linear_attention = _auto.linear_attention
mapped_attention = _auto.mapped_attention
patch_merge = _auto.patch_merge
adamw = _auto.adamw

__all__ = [
    "AdamWStep",
    "Backend",
    "Kernels",
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "bias_gelu",
    "give_back",
    "layer_norm",
    "linear_attention",
    "mapped_attention",
    "most_in_pool",
    "patch_merge",
    "pool_state",
    "qk_norm",
    "rms_norm",
    "tune_allocator",
    "use_pool",
]
