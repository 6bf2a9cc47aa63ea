"""From a resolved configuration to everything one rank needs to train: reads like a recipe.

Grid, layers cut into stages, parameters in flat buckets, schedule, executor, optimizer: in this order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from data import Batch
from engine.config import Config, PrecisionConfig
from engine.device import memory_bytes
from engine.errors import ConfigError
from engine.frozen import Frozen, frozen_of
from engine.layer_list import depths_of, layer_of, outputs_of
from engine.objectives import Objective, make_objective
from engine.optimizers import Optimizer, make_optimizer
from engine.optimizers.ema import WeightAverage
from engine.precision.precision import precision_of
from engine.precision.scaler import LossScaler
from engine.prediction import flop_times, predicted_costs
from engine.recompute import Recompute, SaveSet
from engine.recompute.ahead import Ahead, flops_again, recompute_schedule
from engine.recompute.assignment import assignment
from engine.recompute.timing import LayerTimes
from model import Build, LayerSpec, MicroBatch, Packing, Precision, Stage, makers
from model.kernels import Kernels
from model.matching import Match, MatchPooled
from model.regions import Keep
from model.regions import Policy as RegionPolicy
from parallel import comm
from parallel.comm import Axis
from parallel.contrastive import KeyQueue
from parallel.distillation import Moments
from parallel.fp8 import Fp8Recipe, Fp8Registry, RowProducts, enable_fp8, enable_row_products, row_products
from parallel.grid import Grid, make_grid
from parallel.layout import ParameterInfo
from parallel.pipeline import (
    Placement,
    Schedule,
    Timeline,
    balance,
    behind_forwards,
    forward_only,
    insert_communication,
    partition,
    simulate,
)
from parallel.pipeline.execution import PipelineExecutor, TensorSpec
from parallel.pipeline.lanes import Post, open_post
from parallel.pipeline.readiness import Policy
from parallel.process_group import World
from parallel.sharding import Group, ParameterStore, ShardingPolicy
from parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One rank's share of the model and the means to train it.

    Attributes:
        placement: who holds which stage, and its layers.
        sets: what blocks and patch merges of the whole model keep of a forward pass, where anything is.
        stages: this rank's, by number.
    """

    config: Config
    grid: Grid
    device: torch.device
    objective: Objective
    placement: Placement
    build: Build
    frozen: Frozen
    sets: dict[str, SaveSet]
    stages: dict[int, Stage]
    store: ParameterStore
    schedule: Schedule
    optimizer: Optimizer
    scaler: LossScaler | None
    average: WeightAverage | None
    keys: WeightAverage | None
    queue: KeyQueue | None
    fp8: Fp8Registry | None

    @property
    def holds_images(self) -> bool:
        """Whether a stage of this rank reads images."""
        return any(self._reads_images(stage) for stage in self.stages)

    @property
    def holds_texts(self) -> bool:
        """Whether a stage of this rank reads texts."""
        return any(self.objective.reads_texts(self.placement.layers[stage]) for stage in self.stages)

    @property
    def later_stages_read_images(self) -> bool:
        """Whether another than the first of this rank's stages does."""
        return any(self._reads_images(stage) for stage in sorted(self.stages)[1:])

    def _reads_images(self, stage: int) -> bool:
        return self.objective.reads_images(self.placement.layers[stage])

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Of the whole model."""
        return self.objective.layers

    @property
    def holds_loss(self) -> bool:
        """Whether this rank computes the loss."""
        return self.placement.last in self.stages

    @property
    def training_flops(self) -> int:
        """FLOPs per image of forward and backward, matrix products alone: what MFU counts (Chowdhery et al. 2022)."""
        return sum(layer.flops * n for layer, n in zip(self.layers, self.frozen.passes, strict=True))

    @cached_property
    def predicted(self) -> Timeline:
        """A training step by the simulator, with costs by FLOPs: what the report and `bubble_predicted` tell of."""
        return self.predict(flop_times(self.layers, flops_again(self.layers, self.sets, self.config.model)))

    def predict(self, times: Mapping[str, LayerTimes]) -> Timeline:
        """The same with other times, by the layers' names."""
        sets = {name: of.name for name, of in self.sets.items()}
        costs = predicted_costs(self.schedule, self.placement, self.layers, self.frozen.passes, times, sets)
        return simulate(behind_forwards(self.schedule, self.objective.forward_passes), costs, self.policy)

    @property
    def averages(self) -> tuple[WeightAverage, ...]:
        """All moving averages of the weights that are kept."""
        return tuple(average for average in (self.average, self.keys) if average is not None)

    @property
    def recompute(self) -> Recompute | None:
        """What runs the regions of this rank's blocks, if any of them drops something."""
        return self.build.policy if isinstance(self.build.policy, Recompute) else None

    @property
    def recomputer(self) -> Ahead | None:
        """What runs the R of a schedule."""
        return None if self.recompute is None else Ahead(self.recompute, self.store.use)

    @cached_property
    def row_products(self) -> tuple[RowProducts, ...]:
        """Of linears of teachers in fp8 on this rank."""
        return tuple(row_products(self.stages.values()))

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of what this rank's layers bring on one scale, by their names."""
        parts = (of for stage in self.stages.values() for of in stage.named_modules())
        found = {name: part.moments for name, part in parts if isinstance(part, Match | MatchPooled)}
        return {name: moments for name, moments in found.items() if moments is not None}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that this rank holds, by their names in the model."""
        return {name: p for stage in self.stages.values() for name, p in stage.named_parameters()}

    @property
    def boundaries(self) -> list[tuple[TensorSpec, ...]]:
        """Inputs of every stage (none of the first)."""
        return [self.boundary(layers.start) for layers in self.placement.layers]

    def boundary(self, place: int) -> tuple[TensorSpec, ...]:
        """What a layer, by its place, is sent where a stage begins with it; the first, and past the last: nothing.

        That is the rows of the layer before it, and what rides beside them.
        """
        if not 0 < place < len(self.layers):
            return ()
        return tuple(self.outputs[maker.name] for maker in makers(self.layers, place))

    @cached_property
    def outputs(self) -> dict[str, TensorSpec]:
        """What each layer but the last gives out, by its name."""
        batch = self.config.train.micro_batch_size
        assert batch is not None
        return outputs_of(self.layers, self.frozen.passes, batch, self.build)

    @property
    def policy(self) -> Policy:
        """By which a rank goes on from action to action in training."""
        return self.config.parallel.schedule_policy if self.grid.pipeline.size > 1 else "static"

    @cached_property
    def post(self) -> Post:
        """The lanes of all passes, of training and evaluation. Collective when it is first asked for."""
        ready = self.policy == "ready"
        return open_post(
            self.placement.ranks, self.boundaries, axis=self.grid.pipeline, device=self.device, ready=ready
        )

    def executor(self, schedule: Schedule) -> PipelineExecutor:
        """Runs `schedule`, whose stages are placed as those here, over this rank's."""
        return PipelineExecutor(
            schedule,
            self.stages,
            self.boundaries,
            axis=self.grid.pipeline,
            device=self.device,
            deferrer=self.store.gradients,
            recomputer=self.recomputer,
            before_run=self.store.plan if self.store.gatherer.units else None,
            policy=self.policy,
            group=self._group if self.policy == "ready" else None,
            post=self.post,
        )

    def forwards(self, num_micro_batches: int) -> PipelineExecutor:
        """Runs forwards alone, of so many micro-batches."""
        order = forward_only(self.grid.pipeline.size, num_micro_batches, stage_to_rank=self.placement.ranks)
        return self.executor(insert_communication(order))

    @property
    def _group(self) -> Axis:
        """The ranks that must choose alike what they run next: those with collectives between two actions."""
        p = self.store.policy
        return self.grid.along(*(["data"] if p.stage >= 2 or p.reduce == "micro_batch" else []), "context", "tensor")

    def to_device(self, batch: Batch, *, training: bool) -> MicroBatch:
        """The data package's batch as the model's, on this rank's device."""

        def moved(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(self.device, non_blocking=True)

        reads = self.holds_loss or any(self.objective.reads_outputs(self.placement.layers[n]) for n in self.stages)
        plans = self.device.type == "meta"  # of whose samples nothing is stored
        stored = self.objective.stored(batch, training=training) if reads and not plans else ()
        return MicroBatch(
            images=moved(batch.images),
            labels=batch.labels.to(self.device, non_blocking=True),
            sample_ids=batch.sample_ids.to(self.device, non_blocking=True),
            weights=batch.weights.to(self.device, non_blocking=True),
            training=training,
            texts=moved(batch.texts),
            indices=moved(batch.indices),
            other_labels=moved(batch.other_labels),
            own_shares=moved(batch.own_shares),
            packing=None if batch.maps is None else self._packing(batch.maps),
            teachers=tuple({k: x.to(self.device, non_blocking=True) for k, x in of.items()} for of in stored),
        )

    def _packing(self, maps: Sequence[tuple[int, int]]) -> Packing:
        """Of images of several sizes, in the room of as many of the model's size."""
        sizes = self.config.model.sizes
        return Packing(tuple(maps), sizes.prefix, len(maps) * sizes.tokens, self.device)


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
