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
from parallel.fp8.matmul import fp8_obstacle, matmul
from parallel.fp8.quantise import aligned
from parallel.tensor import products
from tools.benchmark.timing import Fn, interleaved

_SHAPES = (
    (2, 768, 768), (16, 768, 768), (512, 64, 64), (1024, 128, 128), (1024, 256, 256), (1024, 512, 512),
    (1536, 1024, 1024),
)  # fmt: skip
_LARGE = ((4096, 2048, 2048), (8192, 4096, 4096), (8192, 8192, 8192))
"""Rows, input and output width of linears; the large ones on GPUs."""
_KEYS, _LARGE_KEYS = (16, 64, 256, 576), (1024, 4096)
_HEADS, _FEATURES = 12, 64
_MEGABYTES, _LARGE_MEGABYTES = (0.1, 1.0, 8.0, 48.0), (256.0,)
_WIDTH = 512
FORMATS = ("fp32", "bf16", "fp16")
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_MOVES = {"plain": 3.0, "norm": 5.0, "activation": 5.0, "copy": 2.0, "strided": 2.0, "reduction": 1.0}
"""Times that a tensor of x's size is read or written: by y = x + x'; by y = f(x) and dx = df(x, dy); by a copy; by a
transposed one; by a sum over rows.
"""


def measure_device(device: torch.device, rounds: int) -> dict[str, Any]:
    """Rates as in a cluster file, the seconds of a call, and GB/s to the host."""
    large = device.type == "cuda"
    of: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
        "products": (_products, _SHAPES + _LARGE * large),
        "attention": (_attention, _KEYS + _LARGE_KEYS * large),
        "passes": (_passes, _MEGABYTES + _LARGE_MEGABYTES * large),
    }
    found = {
        what: {name: measure(device, DTYPES[name], points, rounds) for name in FORMATS}
        for what, (measure, points) in of.items()
    }
    if fp8_obstacle(device) is None:
        found["products"]["fp8"] = _products_in_8_bits(device, of["products"][1], rounds)
        own = _passes_in_8_bits(device, of["passes"][1], rounds)
        found["passes"]["fp8"] = found["passes"]["bf16"] | own
    return {
        **found,
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
    intensity = _intensities(shapes)
    work = [2 * prod(shape) / 1e12 for shape in shapes]
    return {
        kind: _points(intensity, work, [times[kind, shape] for shape in shapes], times[kind, (1, 1, 1)])
        for kind in kinds
    }


def _products_in_8_bits(device: torch.device, shapes: tuple[tuple[int, int, int], ...], rounds: int) -> dict[str, Any]:
    """All three are products of a row-major and a column-major matrix."""
    runs, one = dict[Any, Fn](), torch.ones(1, device=device)
    every = list(dict.fromkeys(_aligned(shape) for shape in ((1, 1, 1), *shapes)))
    for rows, width, out in every:
        x, weight = (_random(device, _E4M3, shape)[0] for shape in ((rows, width), (out, width)))
        runs[rows, width, out] = partial(matmul, x, weight.t(), one, one, torch.bfloat16)
    times = _median(runs, rounds, device)
    bare, *seconds = (times[shape] for shape in every)
    points = _points(_intensities(every[1:]), [2 * prod(shape) / 1e12 for shape in every[1:]], seconds, bare)
    return dict.fromkeys(("forward", "input_gradient", "weight_gradient"), points)


def _aligned(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """As 8-bit matrices are padded."""
    rows, width, out = map(aligned, shape)
    return rows, width, out


def _intensities(shapes: Sequence[tuple[int, int, int]]) -> list[float]:
    return [1 / sum(1 / side for side in shape) for shape in shapes]


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
    rows, moves = _rows(megabytes, 3 * dtype.itemsize), dict(_MOVES)
    for size, count in rows.items():
        x, other = _random(device, dtype, (count, _WIDTH), (count, _WIDTH))
        runs["plain", size] = partial(torch.add, x, other)
        own = x.clone().requires_grad_()
        runs["norm", size] = partial(_both, norm, own, other)
        runs["activation", size] = partial(_both, gelu, own, other)
        runs["copy", size], runs["strided", size] = x.clone, x.t().contiguous
        runs["reduction", size] = partial(torch.sum, x, 0)
        if dtype != torch.float32:
            runs["cast", size], moves["cast"] = x.float, 1 + 4 / dtype.itemsize
    return _curves(moves, _median(runs, rounds, device), rows, dtype.itemsize)


def _passes_in_8_bits(device: torch.device, megabytes: tuple[float, ...], rounds: int) -> dict[str, Any]:
    """Casts to 8 bits, and copies of transposed matrices: their own of all passes."""
    runs, rows = dict[Any, Fn](), _rows(megabytes, 5)
    for size, count in rows.items():
        (x,) = _random(device, torch.float32, (count, _WIDTH))
        runs["cast", size] = partial(_to_each, x, (_E4M3, _E5M2))
        runs["strided", size] = x.to(_E4M3).t().contiguous
    return _curves({"cast": 10.0, "strided": 2.0}, _median(runs, rounds, device), rows, 1)


def _to_each(x: Tensor, formats: tuple[torch.dtype, ...]) -> None:
    for dtype in formats:
        x.to(dtype)


def _rows(megabytes: tuple[float, ...], each: int) -> dict[float, int]:
    """How many rows of numbers of so many bytes make this size; one to see what a call takes."""
    return {size: max(1, int(size * 1e6 / (each * _WIDTH))) for size in (0.0, *megabytes)}


def _curves(moves: dict[str, float], times: dict[Any, float], rows: dict[float, int], itemsize: int) -> dict[str, Any]:
    """By kind: GB/s over the MB that a pass moves, `moves` times what a tensor has."""
    sizes = [size for size in rows if size]
    return {
        kind: _points(
            [count * rows[size] * _WIDTH * itemsize / 1e6 for size in sizes],
            [count * rows[size] * _WIDTH * itemsize / 1e9 for size in sizes],
            [times[kind, size] for size in sizes],
            times[kind, 0.0],
        )
        for kind, count in moves.items()
    }


def _both(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(function(x), x, grad)


def _host(device: torch.device, rounds: int) -> float:
    """GB/s from the device to its host's memory: on a CPU, of a copy."""
    x = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=device.type == "cuda")
    return x.nbytes / 1e9 / _median({"": partial(there.copy_, x)}, rounds, device)[""]
