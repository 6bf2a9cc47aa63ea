"""What a device reaches: products by intensity, attention by keys, passes by size, and what a call takes at least."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from engine.precision.precision import DTYPES
from engine.recompute.timing import Timing
from model import Build, ModelConfig, build_layers
from model.kernels import Kernels
from parallel.tensor import products
from tools.benchmark.timing import Fn, interleaved

_SHAPES = ((128, 32, 32), (512, 64, 64), (1024, 128, 128), (1024, 256, 256), (1024, 512, 512), (1536, 1024, 1024))
_LARGE = ((4096, 2048, 2048), (8192, 4096, 4096), (8192, 8192, 8192))
"""Rows, input and output width of linears; the large ones on GPUs."""
_KEYS, _LARGE_KEYS = (16, 64, 256, 576), (1024, 4096)
_HEADS, _FEATURES = 12, 64
_MEGABYTES, _LARGE_MEGABYTES = (0.1, 1.0, 8.0, 48.0), (256.0,)
_WIDTH = 512
FORMATS = ("fp32", "bf16", "fp16")
_MOVES = {"plain": 3, "norm": 5, "activation": 5}
"""Times that a tensor of x's size is read or written: by y = x + x'; by y = f(x) and dx = df(x, dy)."""


def measure_device(device: torch.device, rounds: int) -> dict[str, Any]:
    """Rates as in a cluster file, the seconds of a call, and GB/s to the host."""
    large = device.type == "cuda"
    of: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
        "products": (_products, _SHAPES + _LARGE * large),
        "attention": (_attention, _KEYS + _LARGE_KEYS * large),
        "passes": (_passes, _MEGABYTES + _LARGE_MEGABYTES * large),
    }
    return {
        **{
            what: {name: measure(device, DTYPES[name], points, rounds) for name in FORMATS}
            for what, (measure, points) in of.items()
        },
        "launch": _launch(device, rounds),
        "host": _host(device, rounds),
    }


def _launch(device: torch.device, rounds: int) -> float:
    """Seconds of an operator that has nothing to compute: launched ahead on a GPU; on a CPU in a block, with Python,
    autograd and dispatch.
    """
    if device.type == "cuda":
        x = torch.zeros(1, device=device)
        return _median({"": partial(x.add_, 1)}, 10 * rounds, device)[""]
    config = ModelConfig(width=16, depth=1, num_heads=2, image_size=4, patch_size=2, num_classes=2).resolve()
    timing = Timing(layers=build_layers(config)[:2], build=Build(config=config), batch_size=1)
    times = timing.measured(device, 10 * rounds)["blocks.0"]
    return (sum(times.forward.values()) + sum(times.backward.values())) / timing.calls(1)


def _median(alternatives: dict[Any, Fn], rounds: int, device: torch.device) -> dict[Any, float]:
    """Seconds of each, of which small ones run several times in a row, as what they read is in the caches in a run."""
    counts = {key: _repeats(run, device) for key, run in alternatives.items()}
    runs: dict[str, Fn] = {str(key): partial(_repeat, run, counts[key]) for key, run in alternatives.items()}
    times = interleaved(runs, rounds, device)
    return {key: statistics.median(times[str(key)]) / counts[key] for key in alternatives}


def _repeats(run: Fn, device: torch.device) -> int:
    """How often it fits in a millisecond."""
    seconds = statistics.median(interleaved({"": run}, 3, device)[""])
    return max(1, min(100, int(1e-3 / max(seconds, 1e-9))))


def _repeat(run: Fn, count: int) -> None:
    for _ in range(count):
        run()


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def _points(xs: Sequence[float], work: Sequence[float], seconds: Sequence[float], bare: float) -> list[list[float]]:
    """Points of a curve: work per second, beside what a call takes that has nothing to do."""
    return [[float(x), w / max(s - bare, s / 10)] for x, w, s in zip(xs, work, seconds, strict=True)]


def _products(
    device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...], rounds: int
) -> dict[str, Any]:
    runs, kinds, every = dict[Any, Fn](), ("forward", "input_gradient", "weight_gradient"), ((1, 1, 1), *shapes)
    for shape in every:
        rows, width, out = shape
        x, weight, grad = _random(device, dtype, (rows, width), (out, width), (rows, out))
        total = torch.zeros(out, width, device=device)
        runs["forward", shape] = partial(products.linear, x, weight)
        runs["input_gradient", shape] = partial(products.input_gradient, grad, weight)
        runs["weight_gradient", shape] = partial(products.weight_gradient, grad, x, total, accumulate=True)
    times = _median(runs, rounds, device)
    intensity = [1 / sum(1 / side for side in shape) for shape in shapes]
    work = [2 * prod(shape) / 1e12 for shape in shapes]
    return {
        kind: _points(intensity, work, [times[kind, shape] for shape in shapes], times[kind, (1, 1, 1)])
        for kind in kinds
    }


def _attention(device: torch.device, dtype: torch.dtype, keys: tuple[int, ...], rounds: int) -> dict[str, Any]:
    runs, pairs = dict[Any, Fn](), dict[int, int]()
    for count in (1, *keys):
        batch, heads = (max(1, 2048 // count), _HEADS) if count > 1 else (1, 1)
        q, k, v = _random(device, dtype, *[(batch, heads, count, _FEATURES)] * 3)
        pairs[count] = q.numel() * count
        runs["forward", count] = partial(products.attention, q, k, v)
        runs["backward", count] = _gradient(products.attention, q, k, v)
    times = _median(runs, rounds, device)
    return {
        kind: _points(
            keys, [flops * pairs[count] / 1e12 for count in keys], [times[kind, count] for count in keys],
            times[kind, 1],
        )
        for kind, flops in (("forward", 4), ("backward", 10))
    }  # fmt: skip


def _gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Fn:
    """Its backward pass alone."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    y = function(*inputs)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _passes(device: torch.device, dtype: torch.dtype, megabytes: tuple[float, ...], rounds: int) -> dict[str, Any]:
    """Over memory that y = x + x' reads and writes. Norms and activations forward and backward together."""
    kernels, runs = Kernels("auto"), dict[Any, Fn]()
    weight, bias = _random(device, dtype, (_WIDTH,), (_WIDTH,))
    norm, gelu = lambda x: kernels.layer_norm(x, weight, bias), lambda x: kernels.bias_gelu(x, bias, approximate="none")
    rows = {size: max(1, int(size * 1e6 / (3 * _WIDTH * dtype.itemsize))) for size in (0.0, *megabytes)}
    for size, count in rows.items():
        x, other = _random(device, dtype, (count, _WIDTH), (count, _WIDTH))
        runs["plain", size] = partial(torch.add, x, other)
        own = x.clone().requires_grad_()
        runs["norm", size], runs["activation", size] = (
            partial(_both, norm, own, other),
            partial(_both, gelu, own, other),
        )
    times = _median(runs, rounds, device)
    row = _WIDTH * dtype.itemsize / 1e9
    return {
        kind: _points(
            megabytes, [count * rows[size] * row for size in megabytes], [times[kind, size] for size in megabytes],
            times[kind, 0.0],
        )
        for kind, count in _MOVES.items()
    }  # fmt: skip


def _both(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(function(x), x, grad)


def _host(device: torch.device, rounds: int) -> float:
    """GB/s from the device to its host's memory: on a CPU, of a copy."""
    x = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=device.type == "cuda")
    return x.nbytes / 1e9 / _median({"": partial(there.copy_, x)}, rounds, device)[""]
