"""Memory of one layout at ZeRO stages, planned on the meta device by the code that allocates.

A row shows the pipeline rank that needs most, and the bubble that the simulator predicts (times by FLOPs, messages
free).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.config import Config
from engine.plan import MemoryPlan, plan_memory
from engine.recompute_choice import by_flops, choose, copies_by_flops, passes_by_flops
from tools.benchmark.table import Row

_GB = 1e9


def rows(config: Config, ranks: int, memory: float, stages: Sequence[int]) -> list[Row]:
    """One for each ZeRO stage, on devices of `memory` GB."""
    return [row(at_stage(config, stage), ranks, memory) for stage in stages]


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
        config = choose(
            config, shape, memory * _GB, by_flops(config), on_cpu=False, passes=passes, copies=copies_by_flops(config)
        ).config
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
        **({"host_memory_GB": worst.host / _GB} if worst.host else {}),
        "peak_GB": worst.peak / _GB,
        "fits": worst.peak <= memory * _GB,
    }
