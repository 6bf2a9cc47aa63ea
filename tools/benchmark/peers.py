r"""`python -m tools.benchmark peers`: our step against eager PyTorch, torch's DDP, or our own without native kernels.

The same model mathematics, images, dtype, threads, matrix library and allocator settings, in the same processes, taking
turns: A B A B. What counts is the median of the ratios of neighbours. Both do all of a step: forward, backward,
gradient reduction, clipping by the global norm, fused AdamW.

One process, against eager:
    python -m tools.benchmark peers --model.preset vit_s16 --train.global_batch_size 16
Two ranks, against DDP:
    python -m tools.launch --nproc-per-node 2 -m tools.benchmark peers --model.preset vit_s16 \
        --train.global_batch_size 32
Native kernels against plain PyTorch ones, in any layout:
    python -m tools.benchmark peers --against reference --model.preset vit_s16 --train.global_batch_size 8
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data import Batch
from engine.assemble import Assembly, assemble
from engine.device import set_cpu_matmul
from engine.errors import ConfigError
from engine.step import Stepper
from parallel import comm
from parallel.comm import World
from tools.benchmark.bench import Bench, read_config, seconds, started
from tools.benchmark.eager_vit import EagerViT
from tools.benchmark.table import show


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are those of pretrain_vit.py."""
    parser = argparse.ArgumentParser(prog="tools.benchmark peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="measured pairs of steps (default 11)")
    parser.add_argument(
        "--against",
        choices=("torch", "reference"),
        default="torch",
        help="eager PyTorch or DDP (default), or this engine: native kernels against reference ones",
    )
    parser.add_argument("--json", help="also write the rows to this file")
    options, flags = parser.parse_known_args(argv)
    config = read_config(flags)
    if options.against == "reference":
        config = replace(config, kernels="native")
    with started(config, world) as bench:
        if options.against == "reference":
            name, peer = (
                "reference",
                _ours(bench, assemble(replace(bench.config, kernels="reference"), bench.assembly.grid, bench.device)),
            )
        else:
            name, peer = "DDP" if world.size > 1 else "eager", _peer(bench)
        ours, theirs = _interleave(_ours(bench, bench.assembly), peer, bench, options.rounds)
        if world.rank == 0:
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            images = bench.config.train.global_batch_size
            common = {
                "model": bench.config.model.preset,
                "ranks": world.size,
                "threads_per_rank": torch.get_num_threads(),
                "global_batch": images,
                "matmul": set_cpu_matmul(bench.config.precision),
            }
            rows = [
                {
                    **common,
                    "program": program,
                    "step_time_ms": 1000 * statistics.median(times),
                    "images_per_second": images / statistics.median(times),
                    f"time_over_{name}": relative,
                }
                for program, times, relative in (("vitruvius", ours, ratio), (name, theirs, 1.0))
            ]
            show(rows, options.json)


def _ours(bench: Bench, assembly: Assembly) -> Callable[[int], object]:
    stepper = Stepper(assembly)
    return lambda step: stepper.train_step(bench.batches[step % len(bench.batches)], 1e-4)


def _peer(bench: Bench) -> Callable[[int], object]:
    """A step of the plain model, wrapped in DDP where there are several ranks."""
    shape = bench.config.model
    if (shape.block, shape.position, shape.pool, shape.bias, shape.qk_norm) != (
        "sequential", "learned_1d", "cls", True, False
    ):  # fmt: skip
        raise ConfigError("peers compares models as the presets vit_ti16 to vit_gg14 have them: choose one of those")
    if bench.assembly.grid.shape.data != bench.world.size or len(bench.batches[0]) != 1:
        raise ConfigError("peers compares data parallelism with one micro-batch: leave the parallel group alone")
    device, config = bench.device, bench.config.optimizer
    model: nn.Module = EagerViT(bench.config.model.sizes).to(device)
    if bench.world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=config.betas, eps=config.eps, fused=True)

    def step(number: int) -> None:
        batch: Batch = bench.batches[number % len(bench.batches)][0]
        assert batch.images is not None
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.images.to(device)), batch.labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        loss.item()

    return step


def _interleave(
    a: Callable[[int], object], b: Callable[[int], object], bench: Bench, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each program's steps, taking turns; the first two rounds warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for program, record in zip((a, b), times, strict=True):
            comm.barrier(bench.assembly.grid.world)
            record.append(seconds(lambda p=program, n=number: p(n), bench.device))  # type: ignore[misc]
    return times[0][2:], times[1][2:]
