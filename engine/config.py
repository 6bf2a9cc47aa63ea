"""The whole configuration as frozen dataclasses: every key of the YAML file and every dotted flag is a field here.

`resolve` fills in what follows from other keys and refuses what cannot be, before any process group is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import yaml

from data import DataConfig
from engine.errors import ConfigError
from engine.limits import check_numbers, divisors
from engine.scaler import LossScaler
from model import ModelConfig, check_parallel
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
    stage.
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

    max_bad_steps: int = 5
    """Steps in a row with a NaN or Inf loss or gradient, each skipped, after which the run ends with exit code 4."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "steps", "epochs", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}: it must be positive")
            if value is not None and value > MAX_COUNT:
                raise ValueError(f"train.{name} is {value}: it must be at most {MAX_COUNT}")
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}: it must be 0 or more")
        if self.eval_interval < 0:
            raise ValueError(f"train.eval_interval is {self.eval_interval}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated."""

    name: Literal["adamw", "adafactor", "lamb", "muon"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019); Adafactor as Zhai et al. 2022 train ViTs; LAMB (You et al. 2020) for large
    batches; Muon (Jordan et al. 2024) for the matrices of the body, with AdamW for the rest."""

    lr: float = 1e-3
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment; 1e-20 or more."""

    weight_decay: float = 0.03
    """Decay of the body's matrices; norms, biases, positions and learned tokens have none."""

    head_weight_decay: float | None = None
    """Decay of the classifier's matrix (ViT-22B: 3.0 beside 0.03); null: that of the body."""

    decay_by: Literal["lr", "schedule"] = "lr"
    """What weight decay is multiplied by: the learning rate, or the schedule's factor of it alone, as in big_vision,
    where a decay of 1e-4 with schedule is one of 0.1 with a learning rate of 1e-3."""

    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one before it, for fine-tuning (BEiT, Bao et al. 2022)."""

    momentum: float | None = None
    """Of adafactor (kept in bf16; null: 0.9) and muon (null: 0.95)."""

    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, evaluated beside them; null: none is kept."""

    clip_grad: float = 1.0
    """Largest global norm of the gradient, over all axes; 0: no clipping."""

    def __post_init__(self) -> None:
        for name, low in (
            ("lr", 0.0),
            ("weight_decay", 0.0),
            ("clip_grad", 0.0),
            ("head_weight_decay", 0.0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"optimizer.{name} is {value}: it must be {low} or more")
        if not self.eps >= _MIN_EPS:
            raise ValueError(
                f"optimizer.eps is {self.eps}: it must be {_MIN_EPS} or more, as second moments of smaller gradients "
                "are 0 in fp32; usual is 1e-8"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay is {self.layer_decay}: it must be above 0 and at most 1")
        for name in ("momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} is {value}: it must be at least 0 and below 1")
        if self.momentum is not None and self.name not in ("adafactor", "muon"):
            raise ValueError(
                f"optimizer.momentum {self.momentum} has no effect with optimizer.name {self.name}: use betas, or "
                "leave it out"
            )
        default = {f.name: f.default for f in fields(self)}
        for name in ("betas", "eps"):
            if self.name == "adafactor" and getattr(self, name) != default[name]:
                raise ValueError(
                    f"optimizer.{name} {getattr(self, name)} has no effect with optimizer.name adafactor: leave it out"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}: each must be at least 0 and below 1")


# The root of the least fp32 number is 4e-23: where the second moment of a gradient is 0 for its smallness, the first
# one divided by this is still less than 1, and 0 / 0 does not happen.
_MIN_EPS = 1e-20
_MOMENTUM = {"adafactor": 0.9, "muon": 0.95}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the updates, as a factor of optimizer.lr; a step that is skipped is none."""

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
        if self.name != "rsqrt" and self.timescale != 10_000.0:
            raise ValueError(
                f"schedule.timescale {self.timescale} has no effect on schedule.name {self.name}: drop it, or use rsqrt"
            )
        if self.cooldown_steps and self.name in ("cosine", "constant"):
            raise ValueError(
                f"schedule.cooldown_steps {self.cooldown_steps} has no effect on schedule.name {self.name}: "
                "drop it, or use rsqrt or wsd"
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Of weights, activations and matrix products; what the optimizer updates is fp32. fp16 scales the loss; fp8 is
    for the linears of the blocks, the rest in bf16."""

    high_layers: tuple[Literal["embed", "norms", "head"], ...] = ()
    """Kept in fp32 under the other types: patch embedding, weights of all norms, final norm and head."""

    high_first_blocks: int = 0
    """First blocks kept in higher precision: fp32 under bf16 and fp16, bf16 under fp8."""

    high_last_blocks: int = 0
    """Last blocks kept in higher precision."""

    initial_loss_scale: float = 2.0**16
    """fp16: factor of the loss at the first step."""

    min_loss_scale: float = 1.0
    """fp16: the loss scale falls no further; steps that overflow there count as bad."""

    loss_scale_window: int = 1000
    """fp16: steps without overflow after which the loss scale doubles."""

    hysteresis: int = 2
    """fp16: overflows until the loss scale halves; given back when it grows, as in Megatron-LM."""

    fp8_recipe: Literal["delayed", "current"] = "delayed"
    """fp8: scales from the largest values of the last steps, or of the tensor itself."""

    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """fp8: e4m3 forward and e5m2 for gradients, or e4m3 throughout."""

    fp8_history: int = 1024
    """fp8, delayed: steps whose largest values count."""

    fp8_margin: int = 0
    """fp8: scales are smaller than they could be by this power of two."""

    fp8_backend: Literal["auto", "native", "transformer_engine"] = "auto"
    """fp8: our own products or NVIDIA Transformer Engine's; auto: Transformer Engine's where it is installed and can
    run."""

    cpu_matmul: Literal["auto", "mkl", "onednn"] = "auto"
    """Library for fp32 matrix products on a CPU: auto takes oneDNN on AMD processors, where MKL is slow, else MKL."""

    def __post_init__(self) -> None:
        for name in ("high_first_blocks", "high_last_blocks", "fp8_margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"precision.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.fp8_margin > 32:
            raise ValueError(f"precision.fp8_margin is {self.fp8_margin}: it is a power of two, and at most 32")
        if not 1 <= self.fp8_history <= _MAX_HISTORY:
            raise ValueError(f"precision.fp8_history is {self.fp8_history}: it must be from 1 to {_MAX_HISTORY}")
        self.loss_scaler()
        default = {f.name: f.default for f in fields(self)}
        for dtype, prefixes in _ONLY_UNDER.items():
            for name in (n for n in default if n.startswith(prefixes) and getattr(self, n) != default[n]):
                if self.dtype != dtype:
                    raise ValueError(
                        f"precision.{name} {getattr(self, name)} has no effect with precision.dtype {self.dtype}: "
                        f"use dtype {dtype}, or leave it out"
                    )
        if self.fp8_recipe == "current" and self.fp8_history != default["fp8_history"]:
            raise ValueError(
                f"precision.fp8_history {self.fp8_history} has no effect with fp8_recipe current, which looks at the "
                "tensor itself: use delayed, or leave it out"
            )
        if self.dtype == "fp32" and (self.high_layers or self.high_first_blocks or self.high_last_blocks):
            raise ValueError("precision.high_* has no effect with precision.dtype fp32, which is the highest")

    def loss_scaler(self) -> LossScaler:
        """A new one, as configured (for fp16). Raises ValueError for numbers that cannot be."""
        return LossScaler(
            initial_loss_scale=self.initial_loss_scale,
            min_loss_scale=self.min_loss_scale,
            loss_scale_window=self.loss_scale_window,
            hysteresis=self.hysteresis,
        )


_MAX_HISTORY = 2**16  # 64 times the usual; each matrix keeps so many numbers, thrice
_ONLY_UNDER = {"fp16": ("initial_loss", "min_loss", "loss_scale", "hysteresis"), "fp8": ("fp8_",)}


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

    objective: Literal["supervised"] = "supervised"
    """What is trained towards: the classes of labelled images."""

    run_dir: str | None = None
    """Folder for config.yaml, metrics.jsonl and TensorBoard events; made if missing."""

    kernels: Literal["auto", "native", "reference", "apex"] = "auto"
    """Plain PyTorch, compiled kernels, or (auto) compiled where they can run; apex: auto, but NVIDIA apex's LayerNorm
    and AdamW, on CUDA; see docs/kernels.md."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else the CPU with gloo."""

    def __post_init__(self) -> None:
        check_numbers(asdict(self))

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
        momentum = self.optimizer.momentum
        optimizer = replace(
            self.optimizer,
            head_weight_decay=self.optimizer.weight_decay if decay is None else decay,
            momentum=_MOMENTUM.get(self.optimizer.name) if momentum is None else momentum,
        )
        if self.parallel.gradient_dtype == "weights" and self.precision.dtype == "fp32":
            raise ConfigError(
                "parallel.gradient_dtype weights has no effect with precision.dtype fp32: leave it out, or use bf16 or "
                "fp16"
            )
        blocks = self.precision.high_first_blocks + self.precision.high_last_blocks
        if blocks == model.sizes.depth and self.precision.dtype == "fp8":
            raise ConfigError(
                f"precision.high_first_blocks and high_last_blocks leave none of the {blocks} blocks to fp8: use "
                "fewer, or precision.dtype bf16"
            )
        if blocks > model.sizes.depth:
            raise ConfigError(
                f"precision.high_first_blocks and high_last_blocks are {blocks} together, more than the "
                f"{model.sizes.depth} blocks of the model: use fewer"
            )
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
            fits = [] if rest else divisors(per_rank)
            cure = f", or a train.micro_batch_size among {', '.join(map(str, fits))}" if fits else ""
            raise ConfigError(
                f"train.global_batch_size {batch} cannot be dealt to {shape.data} data-parallel ranks in {pieces}: "
                f"use a global batch of {' or '.join(map(str, near))}{cure}"
            )
        return micro

    def without_effect(self, shape: GridShape, device_type: str) -> list[str]:
        """Keys of a resolved configuration that are set and do nothing in this run, each with the reason.

        They are told, not refused: the same configuration may serve other ranks and devices. What does nothing in any
        run is refused.
        """
        p, found = self.parallel, []
        if shape.pipeline == 1 and p.schedule != ParallelConfig.schedule:
            found.append(f"parallel.schedule {p.schedule}: there is one pipeline stage")
        if shape.tensor == 1 and not p.sequence_parallel:
            found.append("parallel.sequence_parallel false: there is one tensor rank")
        if shape.data * shape.context == 1:
            keys = ("zero_stage", "reduce_gradients", "reshard_after_forward", "gather_memory")
            told = [key for key in keys if getattr(p, key) != getattr(ParallelConfig, key)]
            found += [f"parallel.{key} {getattr(p, key)}: no other rank has a copy to share with" for key in told]
        if device_type == "cuda":
            if self.precision.cpu_matmul != PrecisionConfig.cpu_matmul:
                found.append(f"precision.cpu_matmul {self.precision.cpu_matmul}: products are the GPU's")
            if not p.shared_memory:
                found.append("parallel.shared_memory false: collectives are NCCL's")
        elif shape.world_size == 1 and not p.shared_memory:
            found.append("parallel.shared_memory false: there is one rank")
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
        it follows from the number of ranks: the file serves another number, too, and a comment tells what it was.
        """
        text = yaml.safe_dump(_plain(asdict(self)), sort_keys=False)
        if given is None or given.train.micro_batch_size is not None:
            return text
        line = f"\n  micro_batch_size: {self.train.micro_batch_size}\n"
        assert text.count(line) == 1
        return text.replace(line, f"\n  micro_batch_size: null  # here {self.train.micro_batch_size}\n")


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
