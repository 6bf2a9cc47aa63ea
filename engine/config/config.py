"""The whole configuration as frozen dataclasses: every key of the YAML file and every dotted flag is a field here.

`resolve` fills in what follows from other keys and refuses what cannot be, before any process group is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import yaml

from data import DataConfig
from engine.checkpoint.config import CheckpointConfig
from engine.config.contrastive import ContrastiveConfig
from engine.config.distillation import DistillationConfig
from engine.config.limits import check_values
from engine.config.objective_keys import check_objective
from engine.config.objectives import passes_of, resolve_model
from engine.config.pipeline import Pipeline
from engine.config.resolution import check_resolution
from engine.config.train import LogConfig, TrainConfig
from engine.errors import ConfigError
from engine.optimizers.config import OptimizerConfig, ScheduleConfig
from engine.precision.config import PrecisionConfig
from engine.recompute.config import RecomputeConfig
from model import ModelConfig, TextConfig
from parallel.config import ParallelConfig
from parallel.grid import GridShape, shape_for_world


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What the model is"""
    text: TextConfig = field(default_factory=TextConfig)
    """What the text tower is, of objective contrastive"""
    data: DataConfig = field(default_factory=DataConfig)
    """Where images come from"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the ranks are arranged"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, on how many images at a time, towards what"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How parameters are updated"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the steps"""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats"""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """What of a forward pass is kept for backward, and what is computed again there"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved, when, and what a run starts from"""
    log: LogConfig = field(default_factory=LogConfig)
    """What is reported, how often"""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """What is made alike, of objective contrastive"""

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Who teaches what, of objective distillation"""

    objective: Literal["supervised", "contrastive", "distillation"] = "supervised"
    """What is trained towards: the classes of labelled images; that images and their texts (or two views of an image)
    are alike (docs/contrastive.md); or what a trained model, the teacher, makes of images (docs/distillation.md)."""

    run_dir: str | None = None
    """Folder for config.yaml, metrics.jsonl and TensorBoard events; made if missing."""

    kernels: Literal["auto", "native", "reference", "apex"] = "auto"
    """Plain PyTorch, compiled kernels, or (auto) compiled where they can run; apex: auto, but NVIDIA apex's LayerNorm
    and AdamW, on CUDA; see docs/kernels.md."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else the CPU with gloo."""

    def __post_init__(self) -> None:
        check_values(asdict(self))

    def grid_shape(self, world_size: int) -> GridShape:
        """The grid that this configuration makes of `world_size` ranks. Raises ConfigError if it cannot."""
        try:
            return shape_for_world(
                world_size,
                tensor=self.parallel.tensor_parallel_size,
                pipeline=self.parallel.pipeline_parallel_size,
                context=self.parallel.context_parallel_size,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def resolve(self, world_size: int) -> Config:
        """Every key filled in, for a world of this size.

        Raises:
            ConfigError: values that cannot be, alone or together or on this many ranks.
        """
        shape = self.grid_shape(world_size)
        check_objective(self)
        try:
            built = resolve_model(self, shape)
            self.precision.check_depth(built.blocks)
            self.recompute.check_depth(built.blocks)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        pipeline = self.pipeline(shape)
        pipeline.check_layers(built.layers, built.what)
        pipeline.check_recomputes(drops=self.recompute.drops(built.blocks))
        if (self.train.steps is None) == (self.train.epochs is None):
            given = "neither is" if self.train.steps is None else "both are"
            raise ConfigError(f"give either train.steps or train.epochs: {given} set")
        if self.parallel.gradient_dtype == "weights" and self.precision.dtype == "fp32":
            raise ConfigError(
                "parallel.gradient_dtype weights has no effect with precision.dtype fp32: leave it out, or use bf16 or "
                "fp16"
            )
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        train = replace(self.train, micro_batch_size=pipeline.micro_batch_size(batch, micro, shape.data))
        resolved = replace(self, **built.groups, train=train, optimizer=self.optimizer.resolve())
        if self.is_joint:
            group = getattr(resolved, self.objective)
            passes = passes_of(self.objective, group.passes, pipeline, resolved.num_micro_batches(shape))
            resolved = replace(resolved, **{self.objective: replace(group, passes=passes)})
        check_resolution(resolved, shape)
        return resolved

    @property
    def relates_images(self) -> bool:
        """Whether a student learns how the images of a batch lie to each other."""
        return self.objective == "distillation" and self.distillation.relates_images

    @property
    def is_joint(self) -> bool:
        """Whether the loss is one of all images of a step together."""
        return self.objective == "contrastive" or self.relates_images

    def pipeline(self, shape: GridShape) -> Pipeline:
        """The pipeline of this configuration. Raises ConfigError where its schedule does not fit the ranks."""
        one_pass = self.is_joint and getattr(self, self.objective).passes == 1
        return replace(Pipeline.of(self.parallel, shape.pipeline), forwards_first=one_pass)

    def num_micro_batches(self, shape: GridShape) -> int:
        """Micro-batches per step on each data-parallel rank, of a resolved configuration."""
        assert self.train.micro_batch_size is not None
        return self.train.global_batch_size // (self.train.micro_batch_size * shape.data)

    def to_yaml(self, given: Config | None = None) -> str:
        """As a YAML file that can be given as --config.

        With the configuration as it was given before it was resolved, a micro-batch that was left open stays open, as
        it follows from the number of ranks, and so do the passes of a joint loss: the file serves another
        number, too, and a comment tells what it was.
        """
        text = yaml.safe_dump(plain(asdict(self)), sort_keys=False)
        if given is None:
            return text
        if given.train.micro_batch_size is None:
            text = _left_open(text, "micro_batch_size", self.train.micro_batch_size, "null")
        for own, asked in ((self.contrastive, given.contrastive), (self.distillation, given.distillation)):
            if own.passes != asked.passes:
                text = _left_open(text, "passes", own.passes, asked.passes)
        return text


def _left_open(text: str, key: str, here: Any, given: Any) -> str:
    """A key of a configuration in YAML as it was given, with a comment of what it is here."""
    line = f"\n  {key}: {here}\n"
    assert text.count(line) == 1
    return text.replace(line, f"\n  {key}: {given}  # here {here}\n")


def plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML and JSON have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value
