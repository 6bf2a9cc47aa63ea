"""Counts the FLOPs of matrix products, forward and backward, on any device, the meta device included.

The formulas are those of `torch.utils.flop_counter`. Its mode, like any, has torch's compiler imported by the first
operation that it sees, only to be hidden from it; so have the Python functions that give most operators their shapes on
the meta device. That would be two seconds of each rank that starts, so both can be kept from it here.
"""

from __future__ import annotations

import gc
import sys
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SHAPES = "torch._refs", "torch._decomp", "torch._prims"


class EagerMode(TorchDispatchMode):
    """A mode that needs no hiding from a compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's question, in versions that ask."""
        return False


class ProductFlops(EagerMode):
    """Adds up the FLOPs of the products within.

    Attributes:
        flops: 2 per multiply-add.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def without_compiler() -> None:
    """For a process that compiles nothing: have what hides a shape function from the compiler (`torch._disable_dynamo`)
    call it as it is. What it calls it keeps as an attribute of the function. Where a compiler is there already, nothing
    is won.
    """
    if "torch._dynamo" in sys.modules:
        return
    hiding = torch._disable_dynamo(lambda: None).__code__
    for function in gc.get_referrers(hiding):
        if isinstance(function, FunctionType) and (function.__module__ or "").startswith(_SHAPES):
            hidden = dict(zip(hiding.co_freevars, function.__closure__ or (), strict=True))["fn"].cell_contents
            setattr(hidden, "__dynamo_disable", hidden)
