"""What the actions and messages of a schedule cost: the input of the simulator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from parallel.pipeline.actions import ActionKind, Schedule

PerStage = float | tuple[float, ...]
"""One number for all stages, or one per stage."""
PerBoundary = float | tuple[float, ...]
"""One number for all boundaries, or one per boundary: entry s is between the stages s and s + 1."""
PerRank = float | tuple[float, ...]
"""One number for all ranks of the pipeline, or one per rank."""


class Limit(NamedTuple):
    """What a number may be: with these, nothing that is worked out of them leaves the range of floats."""

    least: float
    most: float
    is_whole: bool = False

    def __contains__(self, number: object) -> bool:
        kinds = int if self.is_whole else int | float
        return isinstance(number, kinds) and not isinstance(number, bool) and self.least <= number <= self.most

    def __str__(self) -> str:
        upwards = "or more" if self.most == math.inf else f"to {self.most:g}"
        return f"a {'whole ' * self.is_whole}number, {self.least:g} {upwards}"


_AMOUNT = Limit(0, 1e18)
LIMITS: dict[str, Limit] = {
    "bandwidth": Limit(1e-9, math.inf), "speed": Limit(1e-9, 1e9), "jitter": Limit(0, 10),
    "seed": Limit(0, 1e18, is_whole=True),
    **dict.fromkeys(("forward", "backward_input", "backward_weight", "recompute"), _AMOUNT),
    **dict.fromkeys(("output_bytes", "gradient_bytes", "activation_bytes", "recomputed_bytes"), _AMOUNT),
    **dict.fromkeys(("latency", "norm", "optimizer"), _AMOUNT),
}  # fmt: skip
"""Of each field of `Costs`."""
_ALONE = ("latency", "bandwidth", "jitter", "seed", "norm")  # one number, whatever the schedule


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times and sizes per stage and micro-batch. Units are the caller's: seconds, or multiples of a forward; bytes.

    The whole backward takes the sum of its two parts.

    Raises:
        ValueError: a number is beyond its limit (`LIMITS`), or no number.
    """

    forward: PerStage = 1.0
    backward_input: PerStage = 1.0
    backward_weight: PerStage = 1.0
    recompute: PerStage = 0.0
    """To compute again what a stage has dropped of a micro-batch: by its R, or, where it has none, within its backward,
    which takes so much longer then."""
    latency: float = 0.0
    """Time of an empty message, from the moment both ends have posted it; messages of a channel pass one by one."""
    bandwidth: float = math.inf
    """Bytes per unit of time that a channel carries."""
    output_bytes: PerBoundary = 0.0
    """What a stage sends to the next one per micro-batch."""
    gradient_bytes: PerBoundary | None = None
    """What it gets back for that; None: as much."""
    activation_bytes: PerStage = 0.0
    """What a stage keeps of a micro-batch between forward and backward."""
    recomputed_bytes: PerStage = 0.0
    """What computing again adds to that until the backward is over."""
    speed: PerRank = 1.0
    """Of each rank: it takes 1/speed of the times above, and of the optimizer's."""
    jitter: float = 0.0
    """Standard deviation of the time of each compute action, relative to its mean. Log-normal: never below 0, of any
    size, and late is further from the mean than early, as with real machines. Drawn for each kind, stage and
    micro-batch, the same whatever the schedule; a whole backward has one draw, that of its input half."""
    seed: int = 0
    """Of the jitter."""
    norm: float = 0.0
    """Time of the gradient norm over all ranks, which waits for the last action of the slowest."""
    optimizer: PerRank = 0.0
    """Time of the update that follows it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            limit, is_alone = LIMITS[field.name], field.name in _ALONE
            for number in value if isinstance(value, tuple) and not is_alone else (value,):
                if number not in limit:
                    several = "" if is_alone else ", or a tuple of such"
                    raise ValueError(f"costs: {field.name} is {value!r}: it must be {limit}{several}")

    @staticmethod
    def of_ranks(
        schedule: Schedule,
        *,
        forward: float,
        backward_input: float,
        backward_weight: float,
        recompute: float = 0.0,
        **more: Any,
    ) -> Costs:
        """Of a schedule whose ranks have the work of one micro-batch cut into stages alike.

        Args:
            forward, backward_input, backward_weight, recompute: times of a rank's stages together.
            more: fields of `Costs` as they are.
        """
        share = schedule.num_ranks / schedule.num_stages
        return Costs(
            forward=forward * share, backward_input=backward_input * share, backward_weight=backward_weight * share,
            recompute=recompute * share, **more,
        )  # fmt: skip

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError unless every tuple has one number for each stage, boundary or rank of a schedule."""
        stages, ranks = schedule.num_stages, schedule.num_ranks
        counts = {
            "output_bytes": (stages - 1, "boundaries of stages"),
            "gradient_bytes": (stages - 1, "boundaries of stages"),
            "speed": (ranks, "ranks"),
            "optimizer": (ranks, "ranks"),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            count, of = counts.get(field.name, (stages, "stages"))
            if isinstance(value, tuple) and len(value) != count:
                raise ValueError(f"costs: {field.name} has {len(value)} entries for {count} {of}")

    def durations(self, schedule: Schedule) -> dict[ActionKind, list[float]]:
        """Times of each kind of compute action, by stage * (number of micro-batches) + micro-batch.

        A backward without an R in the schedule takes the time of one as well.
        """
        num, m = schedule.num_stages, schedule.num_micro_batches
        speeds = spread(self.speed, schedule.num_ranks)
        speed = np.array([speeds[rank] for rank in schedule.stage_to_rank])[:, None]
        means = {
            ActionKind.FORWARD: self.forward,
            ActionKind.BACKWARD_INPUT: self.backward_input,
            ActionKind.BACKWARD_WEIGHT: self.backward_weight,
            ActionKind.RECOMPUTE: self.recompute,
        }
        times: dict[ActionKind, list[float]] = {}
        for number, (kind, mean) in enumerate(means.items()):
            factors = np.ones((num, m)) if self.jitter == 0 else self._draw(number, num, m)
            per_stage = np.array(spread(mean, num))[:, None]
            times[kind] = (per_stage / speed * factors).ravel().tolist()
            if kind is ActionKind.BACKWARD_INPUT:
                whole = per_stage + np.array(spread(self.backward_weight, num))[:, None]
                times[ActionKind.BACKWARD] = (whole / speed * factors).ravel().tolist()
        if any(times[ActionKind.RECOMPUTE]):
            within = np.array(times[ActionKind.RECOMPUTE])
            within[[a.stage * m + (a.micro_batch or 0) for a in schedule.recomputes]] = 0.0
            for kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
                times[kind] = (np.array(times[kind]) + within).tolist()
        return times

    def _draw(self, number: int, num_stages: int, num_micro_batches: int) -> np.ndarray:
        """Factors of mean 1 and the jitter's deviation."""
        variance = math.log1p(self.jitter**2)
        normal = np.random.default_rng([self.seed, number]).standard_normal((num_stages, num_micro_batches))
        return np.asarray(np.exp(normal * math.sqrt(variance) - variance / 2))

    def transfers(self, schedule: Schedule) -> tuple[list[float], list[float]]:
        """Time of a message over each boundary: of outputs, of their gradients."""
        boundaries = schedule.num_stages - 1
        gradients = self.output_bytes if self.gradient_bytes is None else self.gradient_bytes
        outputs, gradients = spread(self.output_bytes, boundaries), spread(gradients, boundaries)
        return [self.latency + x / self.bandwidth for x in outputs], [
            self.latency + x / self.bandwidth for x in gradients
        ]


def spread(value: float | Sequence[float], count: int) -> tuple[float, ...]:
    """One number for each of `count`."""
    return (float(value),) * count if isinstance(value, int | float) else tuple(value)


def sum_layers(times: Sequence[float], stages: Iterable[Iterable[int]]) -> tuple[float, ...]:
    """A number per stage from one per layer, given the layers of each stage (`partition`'s ranges)."""
    return tuple(sum(times[layer] for layer in layers) for layers in stages)
