"""`python -m tools.benchmark step`: one training step of a configuration, in the layout it is started in.

One process: `python -m tools.benchmark step --config configs/vit_s16.yaml --train.global_batch_size 16`; several ranks:
`python -m tools.launch --nproc-per-node 2 -m tools.benchmark step --config ...`. Images are random, made beforehand.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from engine.device import peak_memory_bytes, peak_tflops
from engine.run.replicas import check_replicas
from parallel import comm
from parallel.process_group import World
from tools.benchmark.bench import Bench, gemm_tflops, read_config, seconds, started, time_steps
from tools.benchmark.table import Row, show
from tools.options import add_json

_CHECKS = 5  # comparisons of what ranks have copies of (`train.check_interval`), after one that is not counted


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are those of pretrain_vit.py."""
    parser = argparse.ArgumentParser(prog="tools.benchmark step", description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    with started(read_config(flags), world) as bench:
        row = measure(bench, options.steps, options.warmup)
        if world.rank == 0:
            show([row], options.json)


def measure(bench: Bench, steps: int, warmup: int) -> Row:
    """Medians over steps; communication is the mean share over ranks, memory the largest rank's. Collective."""
    a, config = bench.assembly, bench.config
    rates = comm.gather_objects(gemm_tflops(bench.device, config.precision.dtype), a.grid.world)
    times = time_steps(bench, steps, warmup)
    step_time = statistics.median(times.seconds)
    shape = a.grid.shape
    share = statistics.mean(comm.gather_objects(statistics.median(times.waited), a.grid.world))
    checks = [seconds(lambda: check_replicas(a, 0), bench.device) for _ in range(_CHECKS + 1)][1:]
    memory = max(comm.gather_objects(peak_memory_bytes(bench.device), a.grid.world))
    images_per_second = config.train.global_batch_size / step_time
    tflops = a.training_flops * images_per_second / 1e12
    on_gpu = bench.device.type == "cuda"
    peak = peak_tflops(bench.device, config.precision.dtype)
    return {
        "model": config.model.preset or f"{config.model.width}x{config.model.depth}",
        "grid_p_d_c_t": "x".join(map(str, shape.sizes)),
        "global_batch": config.train.global_batch_size,
        "micro_batches": config.num_micro_batches(shape),
        "threads_per_rank": torch.get_num_threads(),
        "step_time_ms": 1000 * step_time,
        "check_of_copies_ms": 1000 * statistics.median(checks) if shape.world_size > 1 else None,
        "images_per_second": images_per_second,
        "compute_share": None if on_gpu else 1 - share,
        "communication_share": None if on_gpu else share,
        "peak_memory_MiB_per_rank": memory / 2**20,
        "tflops_all_ranks": tflops,
        "gemm_tflops_all_ranks": sum(rates),
        "mfu_of_measured_gemm": tflops / sum(rates),
        "mfu_of_datasheet": tflops / shape.world_size / peak if peak else None,
    }
