r"""`python -m tools.benchmark peers`: our step against those of others, or our own without native kernels.

The same model mathematics, images, dtype, threads, matrix library and allocator settings, taking turns: A B A B. What
counts is the median of the ratios of neighbours. All do all of a step: forward, backward, gradient reduction, fused
AdamW. Against eager PyTorch and DDP, also clipping by the global norm, and both in the same processes; against programs
that shard their state, each in processes of its own, so that peak memory is told too, and without clipping.

One process, against eager:
    python -m tools.benchmark peers --model.preset vit_s16 --train.global_batch_size 16
Two ranks, against DDP:
    python -m tools.launch --nproc-per-node 2 -m tools.benchmark peers --model.preset vit_s16 \
        --train.global_batch_size 32
Native kernels against plain PyTorch ones, in any layout:
    python -m tools.benchmark peers --against reference --model.preset vit_s16 --train.global_batch_size 8
Our ZeRO-3 (or --parallel.zero_stage N) against FSDP2 and DeepSpeed's ZeRO-3 (after `make peers`), two ranks each, which
this starts itself:
    python -m tools.benchmark peers --against fsdp2,fsdp2_keep,deepspeed --model.preset vit_s16 \
        --train.global_batch_size 16
The same at one limit of memory, where they must compute activations again:
    python -m tools.benchmark peers --against fsdp2_recompute,deepspeed_recompute --memory-limit auto \
        --model.preset vit_s16 --train.global_batch_size 32
where --memory-only stops when limit and budget are found, which other work on the machine does not change, and prints
the options that take them again.
A pipeline against torch.distributed.pipelining's of the same stages and schedule (1f1b, interleaved or zb_v):
    python -m tools.benchmark peers --against torch_pipeline --model.preset vit_s16 --train.global_batch_size 16 \
        --train.micro_batch_size 2 --parallel.pipeline_parallel_size 2 --parallel.schedule interleaved
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data import Batch
from engine.assemble import assemble
from engine.assembly import Assembly
from engine.device import set_matmul
from engine.errors import ConfigError
from engine.run.step import Stepper
from parallel import comm
from parallel.process_group import World
from tools.benchmark.bench import Bench, read_config, seconds, started
from tools.benchmark.eager_vit import EagerSizes, EagerViT, parameter_groups
from tools.benchmark.peer_coordinator import PEERS, Options, check_plain, compare
from tools.benchmark.table import show
from tools.options import add_json

_PEERS_PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are those of pretrain_vit.py."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds, a step of each program (default 11)")
    parser.add_argument(
        "--against",
        default="torch",
        help="torch (default): eager PyTorch or DDP; reference: this engine without native kernels; or some of "
        f"{','.join(PEERS)}, with commas between them",
    )
    parser.add_argument("--ranks", type=int, default=2, help="of each sharded program (default 2)")
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=_PEERS_PYTHON,
        help="of the environment with DeepSpeed (default: make peers)",
    )
    parser.add_argument(
        "--system-malloc",
        action="store_true",
        help="leave the allocator of FSDP2, DeepSpeed and eager as it is: slower steps, less memory",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="bytes that a rank may take above imports (800MiB, 2GB); auto: between what FSDP2 takes with its blocks "
        "computed again and without. Ours computes again what it must, unless --recompute.policy says what",
    )
    parser.add_argument(
        "--memory-only", action="store_true", help="with --memory-limit: find limit and budget, and measure no time"
    )
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    if options.against not in ("torch", "reference"):
        _in_own_processes(options, flags, world)
        return
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
                "matmul": set_matmul(bench.config.precision, bench.device),
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


def _in_own_processes(options: argparse.Namespace, flags: Sequence[str], world: World) -> None:
    against = options.against.split(",")
    if strange := [name for name in against if name not in PEERS]:
        raise ConfigError(
            f"--against {','.join(strange)}: give torch, reference, or some of {', '.join(PEERS)} with commas between"
        )
    if world.size > 1:
        raise ConfigError(f"--against {options.against} starts ranks of its own: run it without a launcher")
    if options.memory_only and options.memory_limit is None:
        raise ConfigError("--memory-only finds what keeps a limit: give --memory-limit, too")
    if options.rounds < 2:
        raise ConfigError(f"--rounds {options.rounds}: give at least 2")
    own = {
        name: getattr(options, name)
        for name in ("ranks", "rounds", "peers_python", "system_malloc", "json", "memory_limit", "memory_only")
    }
    compare(Options(against=against, **own), flags)


def _ours(bench: Bench, assembly: Assembly) -> Callable[[int], object]:
    stepper = Stepper(assembly)
    return lambda step: stepper.train_step(bench.batches[step % len(bench.batches)], 1e-4)


def _peer(bench: Bench) -> Callable[[int], object]:
    """A step of the plain model, wrapped in DDP where there are several ranks."""
    check_plain(bench.config)
    if bench.assembly.grid.shape.data != bench.world.size or len(bench.batches[0]) != 1:
        raise ConfigError("peers compares data parallelism with one micro-batch: leave the parallel group alone")
    device, config = bench.device, bench.config.optimizer
    model: nn.Module = EagerViT(EagerSizes.of(bench.config.model.sizes)).to(device)
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    if bench.world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
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
