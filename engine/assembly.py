"""What one rank trains with: its share of the model and all that runs it. `engine.assemble` builds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from data import Batch
from engine.config import Config
from engine.frozen import Frozen
from engine.layer_list import outputs_of
from engine.objectives import Objective
from engine.optimizers import Optimizer
from engine.optimizers.ema import WeightAverage
from engine.precision.scaler import LossScaler
from engine.prediction import flop_times, predicted_costs
from engine.recompute import Recompute, SaveSet
from engine.recompute.ahead import Ahead, flops_again
from engine.recompute.timing import LayerTimes
from model import Build, LayerSpec, MicroBatch, Packing, Stage, makers
from model.matching import Match, MatchPooled
from parallel.comm import Axis
from parallel.contrastive import KeyQueue
from parallel.distillation import Moments
from parallel.fp8 import Fp8Registry, RowProducts, row_products
from parallel.grid import Grid
from parallel.pipeline import (
    Placement,
    Schedule,
    Timeline,
    behind_forwards,
    forward_only,
    insert_communication,
    simulate,
)
from parallel.pipeline.execution import PipelineExecutor, TensorSpec
from parallel.pipeline.lanes import Post, open_post
from parallel.pipeline.readiness import Policy
from parallel.sharding import ParameterStore


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
