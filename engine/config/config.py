"""The whole configuration as frozen dataclasses: every key of the YAML file and every dotted flag is a field here.

`resolve` fills in what follows from other keys and refuses what cannot be, before any process group is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import yaml

from data import DataConfig
from engine.checkpoint.config import CheckpointConfig
from engine.config.contrastive import ContrastiveConfig
from engine.config.distillation import DistillationConfig
from engine.config.limits import check_values
from engine.config.objectives import blocks_of, check_objective, passes_of, resolve_model
from engine.config.pipeline import Pipeline
from engine.config.resolution import check_resolution
from engine.errors import ConfigError
from engine.optimizers.config import OptimizerConfig, ScheduleConfig
from engine.precision.config import PrecisionConfig
from engine.recompute.config import RecomputeConfig
from model import ModelConfig, TextConfig
from parallel.config import ParallelConfig
from parallel.grid import GridShape, shape_for_world

MAX_COUNT = 10**9
"""Steps of a run and images of a step: more than any run has, and images drawn in all still have 64-bit numbers."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how many images at a time, towards what."""

    global_batch_size: int = 128
    """Images per optimizer step, over all ranks."""

    micro_batch_size: int | None = None
    """Images that pass through the model at once on one data-parallel rank; null: one micro-batch per pipeline
    rank, or as many as a schedule's file is for.
    """

    steps: int | None = None
    """Optimizer steps; give this or epochs, of which flags displace a file's."""

    epochs: float | None = None
    """Passes over the training set; give this or steps, of which flags displace a file's."""

    seed: int = 0
    """Decides initial weights, data order, augmentation and drop-path, the same in every layout."""

    eval_interval: int = 0
    """Steps between evaluations on the held-out images; 0: only after the last step."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross entropy over classes, or the sum of one binary cross entropy per class (ViT-22B)."""

    label_smoothing: float = 0.0
    """In training, what of each label all classes share evenly, such as 0.1."""

    max_bad_steps: int = 5
    """Steps in a row with a NaN or Inf loss or gradient, each skipped, after which the run ends with exit code 4."""

    check_interval: int = 100
    """Steps between comparisons, by hashes, of what several ranks have copies of; each save has one before it, too. 0:
    never. See docs/runs.md."""

    freeze: tuple[str, ...] = ()
    """Patterns such as blocks.[0-3], embed, *.bias, of whole names of parameters or of what they begin with up to a
    dot: what is not trained.
    """

    stop_step: int | None = None
    """Stop after this step with the schedule as it is, save, and end with exit code 3; null: go to the end."""

    time_limit: float | None = None
    """Minutes from the start after which no step is begun that would not end in time: save, exit code 3."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size", "micro_batch_size", "steps", "epochs", "max_bad_steps", "stop_step", "time_limit",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}: it must be positive")
            if value is not None and value > MAX_COUNT:
                raise ValueError(f"train.{name} is {value}: it must be at most {MAX_COUNT}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"train.label_smoothing is {self.label_smoothing}: it must be from 0 to below 1, such as 0.1"
            )
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}: it must be 0 or more")
        for name in ("eval_interval", "check_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, how often."""

    interval: int = 10
    """Steps between lines of metrics.jsonl and the console."""

    tensorboard: bool = True
    """Whether TensorBoard events are written."""

    profile_steps: tuple[int, int] | None = None
    """First and last step to record in run_dir/profile: timeline.json, and torch's trace of the first; null: none."""

    attention_interval: int = 0
    """Steps between looks at what held-out images have the model attend to, also after the last: maps, entropies, the
    largest logits; 0: never. See docs/seeing.md."""

    attention_images: int = 4
    """How many held-out images that are."""

    def __post_init__(self) -> None:
        if self.attention_interval < 0 or self.attention_images < 1:
            raise ValueError(
                f"log.attention_interval is {self.attention_interval} and log.attention_images {self.attention_images}:"
                " the first must be 0 or more, the second 1 or more"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"log.profile_steps is {list(self.profile_steps)}: give the first and last step, from 1 on"
            )
        if self.interval < 1:
            raise ValueError(f"log.interval is {self.interval}: it must be at least 1")


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

    def without_effect(self, shape: GridShape, device_type: str, steps: int) -> list[str]:
        """Keys of a resolved configuration that are set and do nothing in this run, each with the reason.

        They are told, not refused: the same configuration may serve other ranks and devices. What does nothing in any
        run is refused.
        """
        p, found, blocks = self.parallel, [], blocks_of(self)
        if not self.log.attention_interval and self.log.attention_images != LogConfig.attention_images:
            found.append(f"log.attention_images {self.log.attention_images}: log.attention_interval is 0")
        if self.train.stop_step is not None and self.train.stop_step >= steps:
            found.append(f"train.stop_step {self.train.stop_step}: the run has {steps} steps")
        if shape.pipeline == 1:
            keys = ("layers_per_stage", "schedule", "virtual_stages", "schedule_policy")
            found += _set(p, keys, "there is one pipeline rank")
        if shape.tensor == 1 and not p.sequence_parallel:
            found.append("parallel.sequence_parallel false: there is one tensor rank")
        if shape.data * shape.context * shape.tensor == 1 and self.train.check_interval != TrainConfig.check_interval:
            found.append(f"train.check_interval {self.train.check_interval}: no other rank has copies to compare")
        if shape.data * shape.context == 1:
            keys = ("zero_stage", "reduce_gradients", "reshard_after_forward", "gather_memory")
            found += _set(p, keys, "no other rank has a copy to share with")
        if device_type == "cuda":
            if self.precision.cpu_matmul != PrecisionConfig.cpu_matmul:
                found.append(f"precision.cpu_matmul {self.precision.cpu_matmul}: products are the GPU's")
            if not p.shared_memory:
                found.append("parallel.shared_memory false: collectives are NCCL's")
        elif shape.world_size == 1 and not p.shared_memory:
            found.append("parallel.shared_memory false: there is one rank")
        if not (p.sequence_parallel and shape.tensor > 1) and self.recompute.gathers_again:
            found.append("recompute.policy ...+gather: no rows are gathered, which sequence parallelism splits")
        if self.recompute.offloads and device_type == "cpu":
            found.append("recompute.policy ...+offload, recompute.offload: host memory is the device's own here")
        if self.recompute.norm_from_output:
            why = {
                "what linears keep has other rows, which sequence parallelism gathers": p.sequence_parallel
                and shape.tensor > 1,
                "linears keep 8-bit numbers": self.precision.dtype == "fp8",
                "no block keeps what a norm gives": not self.recompute.keeps_norms(blocks),
            }
            found += [f"recompute.norm_backward output: saves nothing: {reason}" for reason in why if why[reason]][:1]
        if self.recompute.ahead == "never" and not self.recompute.drops(blocks):
            found.append("recompute.ahead never: nothing is dropped")
        elif self.recompute.ahead == "never" and shape.pipeline == 1:
            found.append("recompute.ahead never: there is one pipeline rank, which waits for no gradient")
        o = self.optimizer
        if o.decay_by == "schedule" and not (o.weight_decay or o.head_weight_decay):
            found.append("optimizer.decay_by schedule: nothing decays")
        return found

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


def _set(p: ParallelConfig, keys: Sequence[str], why: str) -> list[str]:
    """Those of these keys that are not at their defaults, each with the reason."""
    told = [key for key in keys if getattr(p, key) != getattr(ParallelConfig, key)]
    return [f"parallel.{key} {getattr(p, key)}: {why}" for key in told]


def plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML and JSON have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value
