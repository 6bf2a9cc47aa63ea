"""Kernels against torch and against the memory's copy rate: `python -m tools.benchmark kernels [--json FILE]`.

Forward and backward, allocation of outputs included. The limit of a kernel is the time that a copy needs for the bytes
that the kernel must move; the copy is measured in turn with the kernels, on arrays of the same size. On a CPU the
allocator is tuned first, for every alternative alike, or page faults are what is measured.
"""

import argparse
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import peak_memory_bytes
from model.kernels import AdamWStep, Kernels, reference, tune_allocator
from tools.benchmark.timing import Fn, interleaved, milliseconds, ratio
from tools.options import add_json

Row = dict[str, object]
NATIVE = Kernels("native")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def _train(fn: Fn, leaves: Sequence[Tensor], *grads: Tensor) -> Fn:
    """Forward and backward."""

    def run() -> None:
        out = fn()
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outputs, leaves, grads[: len(outputs)])

    return run


def _copy(size: int, dtype: torch.dtype, device: torch.device) -> Fn:
    """Copies two arrays of `size` elements: 4 * size elements moved."""
    sources = [torch.randn(size, device=device).to(dtype) for _ in range(2)]
    targets = [torch.empty_like(s) for s in sources]

    def run() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return run


def norm_row(op: str, shape: tuple[int, int], dtype: torch.dtype, repeats: int, device: torch.device) -> Row:
    """layer_norm, rms_norm or add_layer_norm. Arrays that must move: 2 forward, 3 backward; 4 and 4 with a residual."""
    dim = shape[1]
    x, residual = (_leaf(*shape, dtype=dtype, device=device) for _ in range(2))
    weight, bias = (_leaf(dim, dtype=dtype, device=device) for _ in range(2))
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    moved, leaves = 5, [x, weight, bias]

    def torch_add() -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (dim,), weight, bias, 1e-6), total

    if op == "layer_norm":
        native: Fn = lambda: NATIVE.layer_norm(x, weight, bias)  # noqa: E731
        plain: Fn = lambda: F.layer_norm(x, (dim,), weight, bias, 1e-6)  # noqa: E731
    elif op == "rms_norm":
        leaves = [x, weight]
        native = lambda: NATIVE.rms_norm(x, weight)  # noqa: E731
        plain = lambda: F.rms_norm(x, (dim,), weight, 1e-6)  # noqa: E731
    else:
        moved, leaves = 8, [x, residual, weight, bias]
        native = lambda: NATIVE.add_layer_norm(x, residual, weight, bias)  # noqa: E731
        plain = torch_add
    times = interleaved(
        {
            "copy": _copy(x.numel(), dtype, device),
            "native": _train(native, leaves, *grads),
            "torch": _train(plain, leaves, *grads),
        },
        repeats,
        device,
    )
    return {
        "kernel": op,
        "shape": list(shape),
        "dtype": _name(dtype),
        "native_ms": milliseconds(times, "native"),
        "torch_ms": milliseconds(times, "torch"),
        "speedup": ratio(times, "torch", "native"),
        "copy_gb_per_s": 4e-6 * x.numel() * x.element_size() / milliseconds(times, "copy"),
        "share_of_limit": moved / 4 * ratio(times, "copy", "native"),
    }


def attention_row(tokens: int, dtype: torch.dtype, repeats: int, device: torch.device, compiled: bool) -> Row:
    """Linear attention against its einsum form, plain and, if asked, through torch.compile."""
    shape = (2, 8, tokens, 64)
    q, k, v = (_leaf(*shape, dtype=dtype, device=device) for _ in range(3))
    grad = torch.randn(shape, device=device).to(dtype)
    plain = Kernels("reference").linear_attention
    alternatives = {
        "native": _train(lambda: NATIVE.linear_attention(q, k, v), [q, k, v], grad),
        "torch": _train(lambda: plain(q, k, v), [q, k, v], grad),
    }
    if compiled:
        fused = torch.compile(reference.linear_attention)
        alternatives["compiled"] = _train(lambda: fused(q, k, v, "elu", 3, 1e-6), [q, k, v], grad)
    times = interleaved(alternatives, repeats, device)
    row: Row = {
        "kernel": "linear_attention",
        "shape": list(shape),
        "dtype": _name(dtype),
        "native_ms": milliseconds(times, "native"),
        "torch_ms": milliseconds(times, "torch"),
        "speedup": ratio(times, "torch", "native"),
        "gflop_per_s": 6 * 2 * q.numel() * 64 * 1e-6 / milliseconds(times, "native"),
    }
    if compiled:
        row["speedup_over_compiled"] = ratio(times, "compiled", "native")
    return row


def mapped_row(tokens: int, dtype: torch.dtype, repeats: int) -> Row:
    """Attention with the mean of its maps over heads against torch's fused one, which gives none; forward alone."""
    packed = torch.randn(1, tokens, 3, 16, 64).to(dtype)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    alternatives: dict[str, Fn] = {
        "native": lambda: NATIVE.mapped_attention(q, k, v),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    times = interleaved(alternatives, repeats, q.device)
    return {
        "kernel": "mapped_attention, forward",
        "shape": list(q.shape),
        "dtype": _name(dtype),
        "native_ms": milliseconds(times, "native"),
        "torch_ms": milliseconds(times, "torch"),
        "speedup": ratio(times, "torch", "native"),
        "gflop_per_s": 4e-6 * tokens * q.numel() / milliseconds(times, "native"),
    }


def scaling_row(repeats: int, device: torch.device) -> Row:
    """The exponent of linear attention's time between 1k and 64k tokens."""
    lengths = (1024, 65536)
    runs: dict[str, Fn] = {}
    for tokens in lengths:
        q, k, v, grad = (_leaf(1, 8, tokens, 64, dtype=torch.float32, device=device) for _ in range(4))
        runs[str(tokens)] = _train(partial(NATIVE.linear_attention, q, k, v), [q, k, v], grad.detach())
    times = interleaved(runs, repeats, device)
    exponent = math.log(ratio(times, str(lengths[1]), str(lengths[0]))) / math.log(lengths[1] / lengths[0])
    return {"kernel": "linear_attention, 1k to 64k tokens", "dtype": "float32", "exponent_of_time": exponent}


def _peak_memory(tokens: int) -> float:
    """Growth of this process over forward and backward, over the bytes of inputs, output and gradients."""
    small = torch.randn(1, 1, 64, 64)
    NATIVE.linear_attention(small, small, small)  # what is loaded once
    cpu = torch.device("cpu")
    before = peak_memory_bytes(cpu)
    q, k, v, grad = (_leaf(1, 8, tokens, 64, dtype=torch.float32, device=cpu) for _ in range(4))
    out = NATIVE.linear_attention(q, k, v)
    grads = torch.autograd.grad(out, [q, k, v], grad.detach())
    return (peak_memory_bytes(cpu) - before) / sum(t.nbytes for t in (q, k, v, grad, out, *grads))


def memory_row() -> Row:
    """Peak memory of linear attention at 64k tokens, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        share = pool.submit(_peak_memory, 65536).result()
    return {"kernel": "linear_attention, 64k tokens", "dtype": "float32", "peak_memory_over_arrays": share}


def gelu_row(dtype: torch.dtype, repeats: int, device: torch.device) -> Row:
    shape = (4096, 1536)
    x, bias = _leaf(*shape, dtype=dtype, device=device), _leaf(shape[1], dtype=dtype, device=device)
    grad = torch.randn(shape, device=device).to(dtype)
    times = interleaved(
        {
            "copy": _copy(x.numel(), dtype, device),
            "native": _train(lambda: NATIVE.bias_gelu(x, bias), [x, bias], grad),
            "torch": _train(lambda: F.gelu(x + bias), [x, bias], grad),
        },
        repeats,
        device,
    )
    return {
        "kernel": "bias_gelu",
        "shape": list(shape),
        "dtype": _name(dtype),
        "native_ms": milliseconds(times, "native"),
        "torch_ms": milliseconds(times, "torch"),
        "speedup": ratio(times, "torch", "native"),
        "share_of_limit": 5 / 4 * ratio(times, "copy", "native"),
    }


def adamw_row(model_dtype: torch.dtype | None, repeats: int, device: torch.device) -> Row:
    """AdamW over 8 M elements, fp32 gradients; torch's fused form writes no low-precision copy."""
    size = 8 << 20
    weight, grad, moment, square = (torch.rand(size, device=device) for _ in range(4))
    model = None if model_dtype is None else torch.empty(size, dtype=model_dtype, device=device)
    other = torch.nn.Parameter(weight.clone())
    other.grad = grad.clone()
    optimizer = torch.optim.AdamW([other], lr=1e-3, fused=True)
    step = AdamWStep(lr=1e-3, weight_decay=0.01)
    times = interleaved(
        {"native": lambda: NATIVE.adamw(weight, grad, moment, square, model, step), "torch": optimizer.step},
        repeats,
        device,
    )
    return {
        "kernel": "adamw",
        "shape": [size],
        "dtype": "float32" if model_dtype is None else f"float32 + {_name(model_dtype)} weights",
        "native_ms": milliseconds(times, "native"),
        "torch_ms": milliseconds(times, "torch"),
        "speedup": ratio(times, "torch", "native"),
    }


def run(repeats: int = 21, device: torch.device | None = None, compiled: bool = True) -> list[Row]:
    """All rows; each is printed as soon as it is measured."""
    device = device or torch.device("cpu")
    tune_allocator()
    half, single = torch.bfloat16, torch.float32
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(format_row(row), flush=True)

    for op in ("layer_norm", "rms_norm", "add_layer_norm"):
        for shape in ((4096, 1024), (1024, 6144)):
            for dtype in (single, half):
                add(norm_row(op, shape, dtype, repeats, device))
    add(norm_row("layer_norm", (65536, 1024), single, max(3, repeats // 3), device))
    for dtype in (single, half):
        add(gelu_row(dtype, repeats, device))
    for dtype in (single, half):
        add(attention_row(4096, dtype, repeats, device, compiled))
    if device.type == "cpu":
        for dtype in (single, half):
            add(mapped_row(1025, dtype, repeats))
        for tokens in (197, 4097):
            add(mapped_row(tokens, single, max(3, repeats // 5)))
    add(scaling_row(max(3, repeats // 5), device))
    if device.type == "cpu":
        add(memory_row())
    for model_dtype in (None, half):
        add(adamw_row(model_dtype, repeats, device))
    return rows


def format_row(row: Row) -> str:
    values = (f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
    return "  ".join(values)


def main(argv: Sequence[str] | None = None, world: object = None) -> int:
    """The command. `world` is what every benchmark is handed; kernels run in one process and do not use it."""
    parser = argparse.ArgumentParser(prog="tools.benchmark kernels", description=__doc__)
    add_json(parser)
    parser.add_argument("--repeats", type=int, default=21, help="rounds per measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; with 1, CPU seconds are measured (for busy machines)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which is slow to build")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    print("\n".join(NATIVE.describe(device)))
    rows = run(options.repeats, device, not options.no_compile)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
