"""How parameters are updated, at which rate: the groups `optimizer` and `schedule` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal


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

    def resolve(self) -> OptimizerConfig:
        """Every key filled in."""
        decay, momentum = self.head_weight_decay, self.momentum
        return replace(
            self,
            head_weight_decay=self.weight_decay if decay is None else decay,
            momentum=_MOMENTUM.get(self.name) if momentum is None else momentum,
        )


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
