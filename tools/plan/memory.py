"""`python -m tools.plan --config configs/vit_22b.yaml --ranks 64 --gpu-memory 80`: memory per rank, before any GPU;
`python -m tools.plan --measure --out FILE`: a cluster file of this machine (--measure --help);
`python -m tools.plan --anchors`: the time model beside published figures.

Every ZeRO stage in turn (or those of --stages) for the layout of the configuration, planned on the meta device by the
code that allocates. The table shows the pipeline rank that needs most, and the bubble that the simulator predicts
(times by FLOPs, messages free). Options that are not the planner's own are those of pretrain_vit.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

from engine.config import Config
from engine.config.cli import parse
from engine.plan import MemoryPlan, plan_memory
from engine.recompute_choice import by_flops, choose, passes_by_flops
from tools.benchmark.table import Row, show

_GB = 1e9


def main(argv: Sequence[str]) -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(prog="tools.plan", description=__doc__)
    parser.add_argument("--ranks", type=_ranks, required=True, help="world size to plan for")
    parser.add_argument("--gpu-memory", type=_gigabytes, default=80.0, help="GB of each device (default 80)")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=range(4), help="ZeRO (default: all)")
    parser.add_argument("--json", help="also write the rows to this file")
    options, flags = parser.parse_known_args(argv)
    config, _ = parse(["--data.kind", "synthetic", "--data.path", "null", *flags], "tools.plan")
    rows = [row(at_stage(config, stage), options.ranks, options.gpu_memory) for stage in options.stages]
    show(rows, options.json)


def _ranks(text: str) -> int:
    if not (text.isdecimal() and 1 <= len(text) <= 7 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"is {text}: it must be a number of ranks from 1 to 9999999")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        if math.isfinite(size := float(text)) and size > 0:
            return size
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"is {text}: it must be a positive number of GB")


def at_stage(config: Config, stage: int) -> Config:
    """The configuration at another ZeRO stage, with what that stage would refuse left to it."""
    own = config.parallel
    if stage == own.zero_stage:
        return config
    gathers = (own.reshard_after_forward, own.gather_memory) if stage == 3 else ("auto", None)
    parallel = replace(
        own,
        zero_stage=stage,  # type: ignore[arg-type]
        reduce_gradients="auto",
        reshard_after_forward=gathers[0],
        gather_memory=gathers[1],
    )
    return replace(config, parallel=parallel)


def row(config: Config, ranks: int, memory: float) -> Row:
    """The dearest pipeline rank of one configuration, in GB."""
    config = config.resolve(ranks)
    shape = config.grid_shape(ranks)
    if config.recompute.is_auto:
        passes = passes_by_flops(config)
        config = choose(config, shape, memory * _GB, by_flops(config), on_cpu=False, passes=passes).config
    apart = ranks // shape.pipeline
    plans = [plan_memory(config, shape, rank * apart, memory * _GB) for rank in range(shape.pipeline)]
    worst: MemoryPlan = max(plans, key=lambda plan: plan.peak)
    return {
        "zero_stage": config.parallel.zero_stage,
        "grid_p_d_c_t": "x".join(map(str, shape.sizes)),
        "dtype": config.precision.dtype,
        "optimizer": config.optimizer.name,
        "micro_batch": config.train.micro_batch_size,
        "schedule": worst.schedule,
        "bubble": round(worst.bubble, 3),
        "stages_of_rank": "+".join(map(str, worst.stages)) if len(worst.stages) > 1 else worst.stages[0],
        "micro_batches_alive": worst.micro_batches,
        **{f"{name.replace(' ', '_')}_GB": size / _GB for name, size in worst.states.items()},
        "activations_GB": worst.activations / _GB,
        "peak_GB": worst.peak / _GB,
        "fits": worst.peak <= memory * _GB,
    }
