"""Keys that are set and do nothing in a run."""

from __future__ import annotations

from collections.abc import Sequence

from data import Cut
from engine.config.config import Config
from engine.config.objectives import blocks_of
from engine.config.train import LogConfig, TrainConfig
from engine.precision.config import PrecisionConfig
from parallel.config import ParallelConfig
from parallel.grid import GridShape


def without_effect(config: Config, shape: GridShape, device_type: str, steps: int) -> list[str]:
    """Keys of a resolved configuration that are set and do nothing in this run, each with the reason.

    They are told, not refused: the same configuration may serve other ranks and devices. What does nothing in any
    run is refused.
    """
    p, found, blocks = config.parallel, [], blocks_of(config)
    if not config.log.attention_interval and config.log.attention_images != LogConfig.attention_images:
        found.append(f"log.attention_images {config.log.attention_images}: log.attention_interval is 0")
    if config.train.stop_step is not None and config.train.stop_step >= steps:
        found.append(f"train.stop_step {config.train.stop_step}: the run has {steps} steps")
    sharing, share, micro = shape.tensor * shape.context, config.data.share_decoding, config.train.micro_batch_size
    if share != "auto" and sharing == 1:
        found.append(f"data.share_decoding {share}: no other rank sees the same images")
    elif share == "always" and micro is not None and Cut.of(micro, sharing, config.data).count == 1:
        found.append(f"data.share_decoding always: micro-batches of {micro} image(s) cannot be cut")
    if shape.pipeline == 1:
        keys = ("layers_per_stage", "schedule", "virtual_stages", "schedule_policy")
        found += _set(p, keys, "there is one pipeline rank")
    if shape.tensor == 1 and not p.sequence_parallel:
        found.append("parallel.sequence_parallel false: there is one tensor rank")
    if shape.data * shape.context * shape.tensor == 1 and config.train.check_interval != TrainConfig.check_interval:
        found.append(f"train.check_interval {config.train.check_interval}: no other rank has copies to compare")
    if shape.data * shape.context == 1:
        keys = ("zero_stage", "reduce_gradients", "reshard_after_forward", "gather_memory")
        found += _set(p, keys, "no other rank has a copy to share with")
    if device_type == "cuda":
        if config.precision.cpu_matmul != PrecisionConfig.cpu_matmul:
            found.append(f"precision.cpu_matmul {config.precision.cpu_matmul}: products are the GPU's")
        if not p.shared_memory:
            found.append("parallel.shared_memory false: collectives are NCCL's")
    elif shape.world_size == 1 and not p.shared_memory:
        found.append("parallel.shared_memory false: there is one rank")
    if not (p.sequence_parallel and shape.tensor > 1) and config.recompute.gathers_again:
        found.append("recompute.policy ...+gather: no rows are gathered, which sequence parallelism splits")
    if config.recompute.offloads and device_type == "cpu":
        found.append("recompute.policy ...+offload, recompute.offload: host memory is the device's own here")
    if config.recompute.norm_from_output:
        why = {
            "what linears keep has other rows, which sequence parallelism gathers": p.sequence_parallel
            and shape.tensor > 1,
            "linears keep 8-bit numbers": config.precision.dtype == "fp8",
            "no block keeps what a norm gives": not config.recompute.keeps_norms(blocks),
        }
        found += [f"recompute.norm_backward output: saves nothing: {reason}" for reason in why if why[reason]][:1]
    if config.recompute.ahead == "never" and not config.recompute.drops(blocks):
        found.append("recompute.ahead never: nothing is dropped")
    elif config.recompute.ahead == "never" and shape.pipeline == 1:
        found.append("recompute.ahead never: there is one pipeline rank, which waits for no gradient")
    o = config.optimizer
    if o.decay_by == "schedule" and not (o.weight_decay or o.head_weight_decay):
        found.append("optimizer.decay_by schedule: nothing decays")
    return found


def _set(p: ParallelConfig, keys: Sequence[str], why: str) -> list[str]:
    """Those of these keys that are not at their defaults, each with the reason."""
    told = [key for key in keys if getattr(p, key) != getattr(ParallelConfig, key)]
    return [f"parallel.{key} {getattr(p, key)}: {why}" for key in told]
