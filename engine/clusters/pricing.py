"""What a piece of the engine's work would take on a cluster, found by running it on the meta device.

Each operator that is dispatched has a price by the cluster's figures: products, attention, and passes over memory by
the bytes of what goes in and comes out. Collectives of planned axes have theirs, and a clock of their own beside the
device's: what the engine computes between the start of one and the wait for it hides it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from engine.clusters.cluster import Cluster, Collective, Number
from model.flops import EagerMode
from parallel.comm import Axis
from parallel.heartbeat import Whereabouts

Spent = Mapping[str, float]
"""Seconds by what: `products`, `attention`, `memory`, and the name of an axis for what it keeps the device waiting."""

_NUMBERS: dict[torch.dtype, Number] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "_scaled_mm": 0}  # where the factors begin
_MADE = ("empty", "new_empty", "detach", "_efficientzerotensor")  # memory that nobody writes
_OVERWRITES = ("copy_", "zero_", "fill_", "_foreach_copy_")
_KINDS = {"norm": "norm", "gelu": "activation", "silu": "activation"}  # of passes, by a part of the name
_SUMS = ("sum", "mean", "amax", "aminmax", "max", "var")
_COPIES = (*_OVERWRITES, "clone", "cat", "stack", "roll", "constant_pad_nd", "index", "neg")
_FILLS = ("ones", "zeros", "full")


class Pricer(EagerMode):
    """Adds up the prices of what runs within.

    Attributes:
        clock: seconds on the device's. spent: the same by what.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster, self.clock = cluster, 0.0
        self.spent: dict[str, float] = defaultdict(float)
        self._free: dict[str, float] = defaultdict(float)  # of each axis: when its last collective is over
        self._started: dict[tuple[str, str], deque[float]] = defaultdict(deque)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        what, seconds = _price(self.cluster, func, args, kwargs or {}, out)
        self.spend(what, seconds)
        return out

    def spend(self, what: str, seconds: float) -> None:
        """Let the device be busy, or wait."""
        if seconds:
            self.clock += seconds
            self.spent[what] += seconds

    @contextmanager
    def listening(self, where: Whereabouts) -> Iterator[None]:
        """Hear of the collectives of a grid."""
        before, where.listener = where.listener, self
        try:
            yield
        finally:
            where.listener = before

    def watched(self, kind: str, axis: Axis, began: Any, size: int | None) -> None:
        """As Listener: a collective begins (with its size), or is waited for."""
        started = self._started[axis.name, kind]
        if size is None:
            over = started.popleft() if started else 0.0
            self.spend(axis.name, max(0.0, over - self.clock))
            return
        seconds = self.cluster.collective(cast(Collective, kind), size, axis.ranks)
        beside = seconds * self.cluster.overlap(axis.ranks)
        self._free[axis.name] = max(self._free[axis.name], self.clock) + beside
        self.spend(axis.name, seconds - beside)
        started.append(self._free[axis.name])

    def stamp(self) -> float:
        """As Listener."""
        return self.clock

    def now(self, doing: Any) -> None:
        """As Listener."""

    def arrived(self) -> None:
        """As Listener."""

    def enter(self, doing: Any) -> None:
        """As Listener."""

    def leave(self) -> None:
        """As Listener."""


class Calls(EagerMode):
    """Counts the operators within that take time."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += _moved(_name(func), func, _tensors((args, kwargs)), _tensors(out)) > 0
        return out


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2]


def _tensors(of: Any) -> list[Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, Tensor)]


def _price(cluster: Cluster, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, float]:
    """(what, seconds) of one operator."""
    name = _name(func)
    if name in _PRODUCTS:
        return "products", _product(cluster, *args[_PRODUCTS[name] :][:2])
    if "dot_product" in name:
        return "attention", _attention(cluster, name, args)
    seconds, tensors = 0.0, _tensors((args, kwargs))
    if name.startswith("linear_attention"):
        seconds = _linear_attention(cluster, name, args)
    moved = _moved(name, func, tensors, _tensors(out))
    if not moved:
        return "memory", seconds
    kind, dtype = _kind(name, tensors, _tensors(out))
    return "memory", seconds + cluster.over_memory(kind, moved, _number(dtype))


def _kind(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[str, torch.dtype]:
    """(kind of pass over memory, the narrowest format that takes part)."""
    formats = {x.dtype for x in (*inputs, *outputs) if x.is_floating_point() and x.numel() > 1}
    narrow = min(formats, key=lambda dtype: dtype.itemsize, default=torch.float32)
    for part, kind in _KINDS.items():
        if part in name:
            return kind, narrow
    if len(formats) > 1:
        return "cast", narrow
    if name in _SUMS:
        return "reduction", narrow
    if name not in _COPIES and not _fills(name):
        return "plain", narrow
    by_number = name == "index" or any(x.dim() and x.stride(-1) != 1 < x.shape[-1] for x in (*inputs, *outputs))
    return "strided" if by_number else "copy", narrow


def _fills(name: str) -> bool:
    return name.removeprefix("new_").startswith(_FILLS)


def _number(dtype: torch.dtype) -> Number:
    return "fp8" if dtype.itemsize == 1 and dtype.is_floating_point else _NUMBERS.get(dtype, "fp32")


def _product(cluster: Cluster, a: Tensor, b: Tensor) -> float:
    """[..., m, k] [..., k, n]. Which of a linear's three products it is shows in how the factors lie."""
    kind = "forward" if b.stride(-2) == 1 and b.stride(-1) != 1 else "input_gradient"
    if a.stride(-2) == 1 and a.stride(-1) != 1:
        kind = "weight_gradient"
    *batch, m, k = a.shape
    return cluster.product(kind, m, b.shape[-1], k, _number(a.dtype), batch[0] if batch else 1)


def _attention(cluster: Cluster, name: str, args: Any) -> float:
    backward = name.endswith("backward")
    q, k = args[1:3] if backward else args[:2]
    pairs = q.numel() * k.shape[-2]
    return cluster.attend("backward" if backward else "forward", pairs, k.shape[-2], _number(q.dtype))


def _linear_attention(cluster: Cluster, name: str, args: Any) -> float:
    """Two products of [S, K] and [K, K] per head and image, five backward."""
    q = next(x for x in args if isinstance(x, Tensor) and x.dim() == 4)
    b, h, tokens, features = q.shape
    each = cluster.product("forward", tokens, features, features, _number(q.dtype), b * h)
    return each * (5 if name.endswith("backward") else 2)


def _moved(name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that are read and written."""
    given = {x.untyped_storage()._cdata for x in inputs}
    if name.startswith(_MADE):
        return 0
    if not func._schema.is_mutable and all(x.untyped_storage()._cdata in given for x in outputs):
        return 0  # a view
    read = [] if _fills(name) else inputs[1:] if name in _OVERWRITES else inputs
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*read, *outputs))
