"""The whole configuration as frozen dataclasses: every key of the YAML file and every dotted flag is a field here.

`resolve` fills in what follows from other keys and refuses what cannot be, before any process group is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import yaml

from data import DataConfig
from engine.errors import ConfigError
from model import ModelConfig, check_parallel
from parallel.config import ParallelConfig
from parallel.grid import GridShape, shape_for_world


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how many images at a time, towards what."""

    global_batch_size: int = 128
    """Images per optimizer step, over all ranks."""

    micro_batch_size: int | None = None
    """Images that pass through the model at once on one data-parallel rank; null: one micro-batch per pipeline
    stage.
    """

    steps: int | None = None
    """Optimizer steps; give this or epochs."""

    epochs: float | None = None
    """Passes over the training set; give this or steps."""

    seed: int = 0
    """Decides initial weights, data order, augmentation and drop-path, the same in every layout."""

    eval_interval: int = 0
    """Steps between evaluations on the held-out images; 0: only after the last step."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross entropy over classes, or the sum of one binary cross entropy per class (ViT-22B)."""

    max_bad_steps: int = 5
    """Steps in a row with a NaN or Inf loss or gradient, each skipped, after which the run ends with exit code 4."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "steps", "epochs", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}: it must be positive")
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}: it must be 0 or more")
        if self.eval_interval < 0:
            raise ValueError(f"train.eval_interval is {self.eval_interval}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated."""

    name: Literal["adamw"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019): decay is multiplied by the learning rate."""

    lr: float = 1e-3
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.03
    """Decay of the body's matrices; norms, biases, positions and learned tokens have none."""

    head_weight_decay: float | None = None
    """Decay of the classifier's matrix (ViT-22B: 3.0 beside 0.03); null: that of the body."""

    clip_grad: float = 1.0
    """Largest global norm of the gradient, over all axes; 0: no clipping."""

    def __post_init__(self) -> None:
        for name, low in (
            ("lr", 0.0),
            ("eps", 0.0),
            ("weight_decay", 0.0),
            ("clip_grad", 0.0),
            ("head_weight_decay", 0.0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"optimizer.{name} is {value}: it must be {low} or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}: each must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of optimizer.lr."""

    name: Literal["rsqrt", "cosine", "wsd", "constant"] = "cosine"
    """Reciprocal square root with cool-down (ViT-22B), half a cosine, warm-up-stable-decay, or constant."""

    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""

    cooldown_steps: int = 0
    """Last steps with linear decay to 0 (rsqrt, wsd)."""

    timescale: float = 10_000.0
    """Steps over which rsqrt falls by a factor of sqrt(2)."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise ValueError("schedule.warmup_steps and schedule.cooldown_steps must be 0 or more")
        if self.timescale <= 0:
            raise ValueError(f"schedule.timescale is {self.timescale}: it must be positive")
        if self.cooldown_steps and self.name in ("cosine", "constant"):
            raise ValueError(
                f"schedule.cooldown_steps {self.cooldown_steps} has no effect on schedule.name {self.name}: "
                "drop it, or use rsqrt or wsd"
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Literal["fp32"] = "fp32"
    """Of weights, activations and gradients."""

    cpu_matmul: Literal["auto", "mkl", "onednn"] = "auto"
    """Library for fp32 matrix products on a CPU: auto takes oneDNN on AMD processors, where MKL is slow, else MKL."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, how often."""

    interval: int = 10
    """Steps between lines of metrics.jsonl and the console."""

    tensorboard: bool = True
    """Whether TensorBoard events are written."""

    profile_steps: tuple[int, int] | None = None
    """First and last step to record with torch's profiler, one trace per rank in run_dir/profile; null: none."""

    def __post_init__(self) -> None:
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
    log: LogConfig = field(default_factory=LogConfig)
    """What is reported, how often"""

    run_dir: str | None = None
    """Folder for config.yaml, metrics.jsonl and TensorBoard events; made if missing."""

    kernels: Literal["auto", "native", "reference"] = "auto"
    """Plain PyTorch, compiled kernels, or (auto) compiled where they can run; see docs/performance.md."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else the CPU with gloo."""

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
        try:
            model = self.model.resolve()
            check_parallel(model, shape.tensor, shape.context)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if model.head_bias is None:
            model = replace(model, head_bias=-10.0 if self.train.loss == "sigmoid" else 0.0)
        layers = model.sizes.depth + len(model.sizes.stages) + 1
        count = len(model.sizes.stages) - 1
        merges = f"{count} patch merge{'s' * (count > 1)}, " if count else ""
        if shape.pipeline > layers:
            raise ConfigError(
                f"parallel.pipeline_parallel_size {shape.pipeline} is more than the {layers} layers of the model "
                f"(embedding, {model.sizes.depth} blocks, {merges}head): use at most {layers} stages, or a deeper model"
            )
        if (self.train.steps is None) == (self.train.epochs is None):
            given = "neither is" if self.train.steps is None else "both are"
            raise ConfigError(f"give either train.steps or train.epochs: {given} set")
        train = replace(self.train, micro_batch_size=self._micro_batch_size(shape))
        decay = self.optimizer.head_weight_decay
        optimizer = replace(
            self.optimizer, head_weight_decay=self.optimizer.weight_decay if decay is None else decay
        )  # fmt: skip
        return replace(self, model=model, train=train, optimizer=optimizer)

    def _micro_batch_size(self, shape: GridShape) -> int:
        batch, given = self.train.global_batch_size, self.train.micro_batch_size
        per_rank, rest = divmod(batch, shape.data)
        if given is None and not rest and per_rank % shape.pipeline == 0:
            return per_rank // shape.pipeline
        micro = given or 1
        if rest or per_rank % micro or given is None:
            unit = shape.data * (given or shape.pipeline)
            near = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
            pieces = f"micro-batches of {given}" if given else f"{shape.pipeline} micro-batches, one per pipeline stage"
            fits = [m for m in range(1, per_rank + 1) if per_rank % m == 0] if not rest else []
            cure = f", or a train.micro_batch_size among {', '.join(map(str, fits))}" if fits else ""
            raise ConfigError(
                f"train.global_batch_size {batch} cannot be dealt to {shape.data} data-parallel ranks in {pieces}: "
                f"use a global batch of {' or '.join(map(str, near))}{cure}"
            )
        return micro

    def num_micro_batches(self, shape: GridShape) -> int:
        """Micro-batches per step on each data-parallel rank, of a resolved configuration."""
        assert self.train.micro_batch_size is not None
        return self.train.global_batch_size // (self.train.micro_batch_size * shape.data)

    def to_yaml(self) -> str:
        """As a YAML file that can be given as --config."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
