r"""`python -m tools.benchmark attention`: time and memory of every kind of attention against the number of tokens.

One layer's attention alone (from q, k, v to its output, without projections), forward and backward, fp32; kinds take
turns, medians. Memory is what autograd keeps between forward and backward, beside q, k, v themselves, and, for
`explicit`, the softmax written out, the same counted on the meta device.

    python -m tools.benchmark attention                       # 1k, 4k, 16k tokens at width 1024
    python -m tools.benchmark attention --fit                 # ViT-L at 1024 x 1024: predicted memory of each kind
    python -m tools.benchmark attention --pyramid             # a pyramid against a single-scale ViT of the same FLOPs
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.assemble import assemble
from engine.config import Config
from engine.run.step import Stepper
from model import Build, MicroBatch, ModelConfig, StageConfig, VisionTransformer, build_layers
from model.attention import Attention
from model.kernels import tune_allocator
from model.kinds import KINDS
from parallel.process_group import World
from tools.benchmark.bench import seconds, started
from tools.benchmark.table import Row, show
from tools.options import add_json

_CPU = torch.device("cpu")


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tools.benchmark attention", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="squares of whole numbers")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fit", action="store_true", help="memory of ViT-L at 1024 x 1024 in the place of times")
    parser.add_argument("--pyramid", action="store_true", help="a pyramid against one scale in the place of times")
    add_json(parser)
    options = parser.parse_args(argv)
    if options.fit:
        rows = [fit_row(kind) for kind in KINDS]
    elif options.pyramid:
        rows = pyramid_rows(world, options.rounds)
    else:
        rows = cost_rows(options.tokens, options.width, options.heads, options.rounds, torch.device(options.device))
    show(rows, options.json)


def kept_bytes(run: Callable[[], object], known: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage once, `known` tensors apart."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kept = run()
    for x in known:
        storages.pop(x.untyped_storage()._cdata, None)
    del kept
    return sum(storages.values())


def _window(kind: str) -> int | None:
    return None if kind in ("full", "linear") else 8


def _layer(kind: str, tokens: int, width: int, heads: int) -> Attention:
    side = math.isqrt(tokens)
    assert side * side == tokens, f"--tokens {tokens} is no square"
    config = ModelConfig(
        width=width, depth=1, num_heads=heads, image_size=side, patch_size=1, pool="gap", attention=kind,
        window_size=_window(kind), registers=1 if kind == "global_tokens" else 0,
    )  # fmt: skip
    return Attention(Build(config=config.resolve()), kind)


def _train(layer: Attention, qkv: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(layer(qkv), qkv, grad)


def _explicit(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3).unbind(0)
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v


def cost_rows(tokens: Sequence[int], width: int, heads: int, rounds: int, device: torch.device) -> list[Row]:
    """A row per kind: milliseconds and MiB kept at each number of tokens, and the exponent of time over all of them."""
    tune_allocator()  # or page faults of large temporaries are what is measured
    times: dict[tuple[str, int], list[float]] = {}
    memory: dict[tuple[str, int], float] = {}
    for n in tokens:
        runs: dict[str, Callable[[], object]] = {}
        for kind in KINDS:
            layer = _layer(kind, n, width, heads)
            count = layer.tokens
            qkv = torch.randn(count, 3 * width, device=device, requires_grad=True)
            grad = torch.randn(count, width, device=device)
            runs[kind] = partial(_train, layer, qkv, grad)
            memory[kind, n] = kept_bytes(partial(layer, qkv), [qkv]) / 2**20
        meta = torch.empty(n, 3 * width, device="meta", requires_grad=True)
        memory["explicit softmax", n] = kept_bytes(partial(_explicit, meta, heads), [meta]) / 2**20
        for round_ in range(rounds + 1):
            for kind, run in runs.items():
                elapsed = seconds(run, device)
                if round_:
                    times.setdefault((kind, n), []).append(elapsed)
    out: list[Row] = []
    for kind in [*KINDS, "explicit softmax"]:
        row: Row = {"kind": kind}
        medians = {n: statistics.median(times[kind, n]) for n in tokens} if kind in KINDS else {}
        for n in tokens:
            row[f"ms_at_{n}"] = 1000 * medians[n] if medians else None
        first, last = min(tokens), max(tokens)
        slope = math.log(medians[last] / medians[first]) / math.log(last / first) if medians and last > first else None
        row["exponent"] = slope
        for n in tokens:
            row[f"kept_MiB_at_{n}"] = memory[kind, n]
        out.append(row)
    return out


def fit_row(kind: str) -> Row:
    """Predicted memory of training ViT-L/16 at 1024 x 1024 in fp32: weights, gradients and AdamW's moments, and what
    the layers keep per image, measured on one block, embedding and head of one image.
    """
    config = ModelConfig(
        preset="vit_l16", image_size=1024, pool="gap", attention=kind, window_size=_window(kind),
        global_tokens=1 if kind == "global_tokens" else 0,
    ).resolve()  # fmt: skip
    parameters = sum(layer.parameters for layer in build_layers(config))
    small = VisionTransformer(replace(config, depth=1, num_classes=1))
    images = torch.randn(1, 3, 1024, 1024)
    batch = MicroBatch.of_images(images, training=True)
    weights = list(small.parameters())
    x = small.get_submodule("embed")(None, batch)
    block = kept_bytes(lambda: small.get_submodule("blocks.0")(x, batch), weights)
    ends = kept_bytes(lambda: small(batch), weights) - block
    image, states = config.sizes.depth * block + ends, 16 * parameters
    return {
        "kind": kind,
        "tokens": config.sizes.tokens,
        "states_GiB": states / 2**30,
        "kept_per_image_GiB": image / 2**30,
        "peak_with_1_image_GiB": (states + image) / 2**30,
        "images_in_80_GB": int((80e9 - states) // image),
    }


def pyramid_rows(world: World, rounds: int) -> list[Row]:
    """Twelve blocks that end at width 384 on a 14 x 14 map: all of them there, or seven on 28 x 28 at width 192 first,
    which takes the same FLOPs in its matrices. Steps take turns.
    """
    common = {"image_size": 224, "in_channels": 3, "num_classes": 1000, "pool": "gap", "window_size": 7}
    single = ModelConfig(**common, width=384, depth=12, num_heads=6, patch_size=16)  # type: ignore[arg-type]
    models = {"single scale": single}
    for kind in ("window", "linear"):
        fine, coarse = (
            StageConfig(depth=7, width=192, num_heads=3, attention=kind),
            StageConfig(depth=5, width=384, num_heads=6),
        )
        models[f"pyramid, {kind} first"] = ModelConfig(**common, stages=(fine, coarse), patch_size=8)  # type: ignore[arg-type]
    config = Config(model=single)
    config = replace(config, train=replace(config.train, global_batch_size=8, steps=1))
    steppers = {}
    with started(config, world) as bench:
        for name, model in models.items():
            own = replace(bench.config, model=replace(model.resolve(), head_bias=0.0))
            steppers[name] = Stepper(assemble(own, bench.assembly.grid, bench.device))
        times: dict[str, list[float]] = {name: [] for name in steppers}
        for number in range(rounds + 2):
            for name, stepper in steppers.items():
                batches = bench.batches[number % len(bench.batches)]
                run = lambda s=stepper, b=batches: s.train_step(b, 1e-4)  # noqa: E731
                times[name].append(seconds(run, bench.device))
    rows = []
    for name, stepper in steppers.items():
        layers = stepper.assembly.layers
        ratios = [a / b for a, b in zip(times[name][2:], times["single scale"][2:], strict=True)]
        rows.append(
            {
                "model": name,
                "parameters_M": sum(layer.parameters for layer in layers) / 1e6,
                "gflop_per_image_forward": sum(layer.flops for layer in layers) / 1e9,
                "step_time_ms": 1000 * statistics.median(times[name][2:]),
                "time_over_single_scale": statistics.median(ratios),
            }
        )
    return rows
