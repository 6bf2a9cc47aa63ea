"""From a resolved configuration to everything one rank needs to train: reads like a recipe.

Grid, layers cut into stages, parameters in flat buckets, schedule, executor, optimizer: in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data import Batch
from engine.config import Config
from engine.optimizer import AdamW, make_optimizer
from model import Build, LayerSpec, MicroBatch, Stage, build_layers
from model.kernels import Kernels
from parallel.grid import Grid
from parallel.pipeline import Schedule, build_schedule, partition, validate
from parallel.pipeline.execution import PipelineExecutor, TensorSpec
from parallel.sharding import GradientBuffer
from parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One rank's share of the model and the means to train it."""

    config: Config
    grid: Grid
    device: torch.device
    layers: tuple[LayerSpec, ...]
    stages: tuple[range, ...]
    build: Build
    module: Stage
    gradients: GradientBuffer
    schedule: Schedule
    optimizer: AdamW

    @property
    def holds_images(self) -> bool:
        """Whether this rank's stage embeds images."""
        return self.grid.pipeline.index == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.grid.pipeline.index == self.grid.pipeline.size - 1

    def executor(self, schedule: Schedule) -> PipelineExecutor:
        """Runs `schedule` over this rank's stage."""
        batch = self.config.train.micro_batch_size
        assert batch is not None
        before = [self.layers[r.start - 1].boundary(batch, self.build) if r.start else None for r in self.stages]
        return PipelineExecutor(
            schedule,
            dict.fromkeys(schedule.stages_of(self.grid.pipeline.index), self.module),
            [(TensorSpec(shape),) if shape else () for shape in before],
            axis=self.grid.pipeline,
            device=self.device,
            deferrer=self.gradients,
        )

    def to_device(self, batch: Batch, *, training: bool) -> MicroBatch:
        """The data package's batch as the model's, on this rank's device."""
        images = batch.images.to(self.device, non_blocking=True) if batch.images is not None else None
        return MicroBatch(
            images=images,
            labels=batch.labels.to(self.device, non_blocking=True),
            sample_ids=batch.sample_ids.to(self.device, non_blocking=True),
            weights=batch.weights.to(self.device, non_blocking=True),
            training=training,
        )


def cut_into_stages(layers: Sequence[LayerSpec], num_stages: int) -> tuple[range, ...]:
    """Consecutive layers per stage, the dearest stage as cheap as can be."""
    return partition([float(layer.flops) for layer in layers], num_stages)


def assemble(config: Config, grid: Grid, device: torch.device, layers: Sequence[LayerSpec] | None = None) -> Assembly:
    """Build this rank's share.

    Args:
        config: resolved for this world. grid: its groups made. device: of this rank.
        layers: of the model, if they were built already.
    """
    layers = tuple(layers or build_layers(config.model))
    tp = TensorParallel(axis=grid.tensor, sequence_parallel=config.parallel.sequence_parallel)
    stages = cut_into_stages(layers, grid.pipeline.size)
    own = stages[grid.pipeline.index]
    build = Build(
        config=config.model, tp=tp, context=grid.context, seed=config.train.seed, kernels=Kernels(config.kernels)
    )  # fmt: skip
    module = Stage(layers[own.start : own.stop], build)
    stage = config.parallel.zero_stage
    gradients = GradientBuffer(module, grid=grid, device=device, seed=config.train.seed, zero_stage=stage)
    module.to(device)
    schedule = build_schedule(config.parallel.schedule, grid.pipeline.size, config.num_micro_batches(grid.shape))
    validate(schedule)
    return Assembly(
        config=config,
        grid=grid,
        device=device,
        layers=layers,
        stages=stages,
        build=build,
        module=module,
        gradients=gradients,
        schedule=schedule,
        optimizer=make_optimizer(config.optimizer, gradients, build.kernels),
    )
