"""From a resolved configuration to everything one rank needs to train: reads like a recipe.

Grid, layers cut into stages, parameters in flat buckets, schedule, executor, optimizer: in this order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

import torch
from torch import nn

from engine.assembly import Assembly
from engine.config import Config, PrecisionConfig
from engine.device import memory_bytes
from engine.errors import ConfigError
from engine.frozen import frozen_of
from engine.layer_list import depths_of, layer_of
from engine.objectives import Objective, make_objective
from engine.optimizers import make_optimizer
from engine.optimizers.ema import WeightAverage
from engine.precision.precision import precision_of
from engine.recompute import Recompute, SaveSet
from engine.recompute.ahead import flops_again, recompute_schedule
from engine.recompute.assignment import assignment
from model import Build, LayerSpec, Precision, Stage
from model.kernels import Kernels
from model.regions import Keep
from model.regions import Policy as RegionPolicy
from parallel import comm
from parallel.fp8 import Fp8Recipe, Fp8Registry, enable_fp8, enable_row_products
from parallel.grid import Grid, make_grid
from parallel.layout import ParameterInfo
from parallel.pipeline import Placement, Schedule, balance, partition
from parallel.process_group import World
from parallel.sharding import Group, ParameterStore, ShardingPolicy
from parallel.tensor import TensorParallel


def cut_into_stages(
    layers: Sequence[LayerSpec], passes: Sequence[int], stage_to_rank: Sequence[int]
) -> tuple[range, ...]:
    """Consecutive layers per stage, the dearest stage as cheap as can be, and the shares of the ranks even.

    Args:
        passes: of each layer, products of the forward's cost (engine.frozen). stage_to_rank: who holds each stage.
    """
    costs = [float(layer.flops * count) for layer, count in zip(layers, passes, strict=True)]
    return balance(costs, partition(costs, len(stage_to_rank)), stage_to_rank)


def placement_of(config: Config, layers: Sequence[LayerSpec], passes: Sequence[int], schedule: Schedule) -> Placement:
    """The layers of each stage of a schedule: as parallel.layers_per_stage says, else cut by their cost.

    Args:
        config: resolved. passes: as of `cut_into_stages`.
    """
    given = config.parallel.layers_per_stage
    if given is None or schedule.num_ranks == 1:
        return Placement.of(schedule, cut_into_stages(layers, passes, schedule.stage_to_rank))
    return Placement.of(
        schedule, [range(end - count, end) for count, end in zip(given, accumulate(given), strict=True)]
    )


def grid_of(config: Config, world: World, device: torch.device) -> Grid:
    """The grid that a resolved configuration asks for. Collective."""
    p = config.parallel
    shape = config.grid_shape(world.size)
    return make_grid(shape, world, device, shared_memory=p.shared_memory, timeout=p.timeout)


def sharding_policy(config: Config, memory: float, *, on_cpu: bool) -> ShardingPolicy:
    """What the `parallel` group says of sharding, on a rank with `memory` bytes.

    On a CPU gathering again is a copy in memory, and cheaper than the memory that it saves.
    """
    p = config.parallel
    reduce = p.reduce_gradients
    if reduce == "auto":
        reduce = "micro_batch" if p.zero_stage >= 2 else "step"
    spare = 0.0 if on_cpu else memory / 10
    budget = spare if p.gather_memory is None else p.gather_memory * 2.0**20
    return ShardingPolicy(
        stage=p.zero_stage,
        reduce=reduce,
        gradient_dtype=torch.float32 if p.gradient_dtype == "fp32" else None,
        gather={"auto": budget, "always": 0.0, "never": float("inf")}[p.reshard_after_forward],
        unit_bytes=int(p.bucket_mib * 2**20),
    )


def enable_8_bits(
    config: PrecisionConfig,
    stages: Collection[nn.Module],
    precision: Precision,
    device: torch.device,
    *,
    keep_weights: bool = True,
) -> Fp8Registry | None:
    """Give the linears of the layers that are to be in fp8 their products; what is trained of them is registered."""
    enable_row_products(
        stages, keep_weights=keep_weights, skip=lambda name: layer_of(f"{name}.weight") not in precision.fp8_rows
    )
    if not precision.fp8:
        return None
    recipe = Fp8Recipe(
        scaling=config.fp8_recipe, format=config.fp8_format, history=config.fp8_history, margin=config.fp8_margin
    )
    try:
        return enable_fp8(
            stages, recipe=recipe, device=device, backend=config.fp8_backend, keep_weights=keep_weights,
            skip=lambda name: layer_of(f"{name}.weight") not in precision.fp8,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"precision.{error}") from error


def _recompute(sets: Mapping[str, SaveSet], layers: Collection[str], *, of_gpu: bool) -> RegionPolicy:
    """Who runs the regions of these layers."""
    own = {name: of for name, of in sets.items() if name in layers and not of.keeps_all}
    return Recompute(own, of_gpu=of_gpu) if own else Keep()


def assemble(
    config: Config,
    grid: Grid,
    device: torch.device,
    objective: Objective | None = None,
    device_memory: float | None = None,
    regions: RegionPolicy | None = None,
) -> Assembly:
    """Build this rank's share.

    Args:
        config: resolved for this world. grid: its groups made. device: of this rank.
        objective: the configuration's, if it was made already. device_memory: bytes of this rank's device, or of its
            share of the host (default: all of it); what goes by it goes by the least of all ranks.
        regions: who runs those of blocks, instead of what the configuration says of recomputation.
    """
    objective = objective or make_objective(config)
    layers = objective.layers
    tp = TensorParallel(axis=grid.tensor, sequence_parallel=config.parallel.sequence_parallel)
    schedule = config.pipeline(grid.shape).schedule(config.num_micro_batches(grid.shape))
    frozen = frozen_of(config, layers)
    placement = placement_of(config, layers, frozen.passes, schedule)
    precision = precision_of(config.precision, layers)
    held = placement.on(grid.pipeline.index)
    sets = assignment(config.recompute, layers, frozen.passes)
    if config.recompute.ahead == "auto" and grid.pipeline.size > 1:
        again = flops_again(layers, sets, config.model)
        policy_of_ranks = config.parallel.schedule_policy
        schedule = recompute_schedule(schedule, placement, layers, frozen.passes, again, policy_of_ranks)
    own = {layers[i].name for s in held for i in placement.layers[s]}
    build = Build(
        config=config.model, tp=tp, context=grid.context, seed=config.train.seed, kernels=Kernels(config.kernels),
        precision=precision, norm_from_output=config.recompute.norm_from_output,
        policy=regions or _recompute(sets, own, of_gpu=grid.planned and not grid.shared_memory),
    )  # fmt: skip
    stages = {number: Stage([layers[i] for i in placement.layers[number]], build) for number in held}
    for stage in stages.values():
        frozen.apply(stage)
    available = comm.least(memory_bytes(device) if device_memory is None else device_memory, grid.world)
    policy = sharding_policy(config, available, on_cpu=device.type == "cpu" or (grid.planned and grid.shared_memory))
    depths = depths_of(layers)
    by_layer = config.optimizer.layer_decay != 1

    def group_of(name: str, info: ParameterInfo) -> Group:
        return Group(info.decay, depths[layer_of(name)] if by_layer else 0)

    store = ParameterStore(
        [stage.layers for stage in stages.values()],
        grid=grid, device=device, seed=config.train.seed, policy=policy, group_of=group_of,
        dtype_of=precision.of_weight,
        forward_only={layer.name for layer, passes in zip(layers, frozen.passes, strict=True) if passes == 1},
    )  # fmt: skip
    store.recomputed = frozenset(name for name, of in sets.items() if of.drops)
    for stage in stages.values():
        stage.to(device)
    return Assembly(
        config=config,
        grid=grid,
        device=device,
        objective=objective,
        placement=placement,
        build=build,
        frozen=frozen,
        sets=sets,
        stages=stages,
        store=store,
        schedule=schedule,
        optimizer=make_optimizer(
            config.optimizer, store.fragments(), build.kernels, depth=len(layers) - 1 if by_layer else 0
        ),
        scaler=config.precision.loss_scaler() if config.precision.dtype == "fp16" else None,
        average=None if config.optimizer.ema_decay is None else WeightAverage(store, config.optimizer.ema_decay),
        keys=None
        if objective.momentum is None
        else WeightAverage(store, objective.momentum, name="keys", corrected=False),
        queue=objective.key_queue(grid, config.train.seed, device) if placement.last in held else None,
        fp8=enable_8_bits(config.precision, stages.values(), precision, device, keep_weights=policy.stage < 3),
    )
