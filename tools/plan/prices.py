"""Prices of layers, and steps that are made of them, each found once for all layouts that have them in common.

Layers are priced once for each number of tensor and context ranks and size of a micro-batch. Steps of many
micro-batches are those of few and a steady rest: between two lengths beyond all that is special at the ends of a step,
time goes straight, and the peak of memory is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from engine.clusters import Cluster
from engine.config import Config
from engine.config.objective_keys import few_images
from engine.step_time import StepModel, StepTime
from parallel.grid import GridShape
from parallel.pipeline import Placement, Schedule
from parallel.pipeline.actions import ActionKind
from parallel.pipeline.communication import insert_communication
from parallel.pipeline.schedules import compute_order
from tools.plan.layouts import Key, Layout

_GB = 1e9
_PASSES = 4  # over the ranks, after which a schedule may repeat itself; else after twice as many
_SETTLED = 1e-7


@dataclass
class Prices:
    """Of the layouts of a configuration on ranks of a cluster.

    Attributes:
        counts: what was done how often.
    """

    config: Config
    cluster: Cluster
    ranks: int
    counts: dict[str, int] = field(default_factory=lambda: {"priced": 0, "simulated": 0, "solved": 0})
    _models: dict[object, StepModel] = field(default_factory=dict)
    _schedules: dict[object, Schedule] = field(default_factory=dict)
    _placements: dict[object, Placement] = field(default_factory=dict)
    _on: dict[object, StepModel] = field(default_factory=dict)

    @property
    def memory(self) -> float:
        """Bytes of a device."""
        return self.cluster.memory.gb * _GB

    @cached_property
    def budget(self) -> int:
        """Bytes that a rank may take."""
        recompute = self.config.recompute
        return replace(recompute, policy="auto").budget(self.memory)

    def peak_flops(self) -> float | None:
        """FLOP/s of all ranks."""
        peak = self.cluster.peak.tflops.get(self.config.precision.dtype)
        return None if peak is None else peak * 1e12 * self.ranks

    # -- layouts ------------------------------------------------------------------------------------------------------

    def _few(self, layout: Layout, config: Config) -> Config:
        """The same with as few micro-batches as tell how it goes on. With gpipe each one more is one more alive, and a
        joint loss holds what the last layer gives of all.
        """
        holds_all = layout.schedule == "gpipe" or config.is_joint
        short = self._count(layout) if holds_all else self._lengths(layout)[0]
        return replace(config, train=replace(config.train, global_batch_size=short * layout.micro_batch * layout.data))

    def _step(self, model: StepModel, layout: Layout, sets: Mapping[str, str]) -> Length:
        """Of a step as long as the configuration's."""
        self.counts["simulated"] += 1
        passes, before = _PASSES, None
        while True:
            lengths = self._lengths(layout, passes)
            step = self._by_lengths(model, layout, sets, lengths)
            if lengths[0] == lengths[1] or (before and abs(step.seconds - before) <= _SETTLED * before):
                return step
            passes, before = 2 * passes, step.seconds

    def _by_lengths(
        self, model: StepModel, layout: Layout, sets: Mapping[str, str], lengths: tuple[int, int]
    ) -> Length:
        steps = [self._of_length(model, layout, sets, n) for n in dict.fromkeys(lengths)]
        return Length.between(steps, lengths, self._count(layout), model)

    def _of_length(self, model: StepModel, layout: Layout, sets: Mapping[str, str], count: int) -> StepTime:
        schedule = self._schedule(layout, count)
        placement = self._placement(model, schedule)
        if any(name != "all" for name in sets.values()):
            schedule = model.ahead(schedule, placement, sets)
        return model.step(schedule, placement, sets)

    def _lengths(self, layout: Layout, passes: int = _PASSES) -> tuple[int, int]:
        """Two numbers of micro-batches by which those of the step are found; twice that number, if it is small."""
        count, p = self._count(layout), layout.pipeline
        short = (passes if p > 1 else 1) * p + count % p
        return (count, count) if count <= short + p else (short, short + p)

    def _count(self, layout: Layout) -> int:
        return self.config.train.global_batch_size // (layout.data * layout.micro_batch)

    def _priced(self, layout: Layout) -> StepModel:
        key = layout.grid, layout.sequence, layout.zero, layout.micro_batch
        if key not in self._on:
            of = Key(tensor=layout.tensor, sequence=layout.sequence, context=layout.context)
            model = self._model(of, layout.micro_batch, self.cluster)
            self._on[key] = model.on(self._resolved(layout), shape_of(layout))
        return self._on[key]

    def _model(self, key: Key, micro_batch: int, cluster: Cluster) -> StepModel:
        where = key, micro_batch, cluster is self.cluster
        if where not in self._models:
            self.counts["priced"] += 1
            layout, config = self._alone(key, micro_batch)
            self._models[where] = StepModel.of(config, shape_of(layout), cluster)
        return self._models[where]

    def _alone(self, key: Key, micro_batch: int) -> tuple[Layout, Config]:
        """On as few ranks as can be, for as few images, which count as images of the model's size."""
        layout = Layout(tensor=key.tensor, sequence=key.sequence, context=key.context, micro_batch=micro_batch)
        train = replace(self.config.train, global_batch_size=few_images(micro_batch))
        config = replace(self.config, train=train, data=replace(self.config.data, variable_resolution=0.0))
        return layout, layout.configured(config).resolve(key.tensor * key.context)

    def _resolved(self, layout: Layout) -> Config:
        return layout.configured(self.config).resolve(self.ranks)

    def _schedule(self, layout: Layout, count: int) -> Schedule:
        key = layout.schedule, layout.pipeline, count, layout.virtual
        if key not in self._schedules:
            self._schedules[key] = insert_communication(compute_order(*key))  # checked where one is run
        return self._schedules[key]

    def _placement(self, model: StepModel, schedule: Schedule) -> Placement:
        key = schedule.stage_to_rank, model.config.parallel.layers_per_stage
        if key not in self._placements:
            self._placements[key] = model.placement(schedule)
        return self._placements[key]


@dataclass(frozen=True, kw_only=True)
class Length:
    """A step of any length."""

    seconds: float
    parts: Mapping[str, float]
    model: StepModel

    @staticmethod
    def between(steps: Sequence[StepTime], lengths: tuple[int, int], count: int, model: StepModel) -> Length:
        short, long = lengths
        share = 0.0 if short == long else (count - short) / (long - short)

        def at(values: Sequence[float]) -> float:
            return values[0] + share * (values[-1] - values[0])

        names = dict.fromkeys(name for step in steps for name in step.parts)
        parts = {name: at([step.parts.get(name, 0.0) for step in steps]) for name in names}
        return Length(seconds=at([step.seconds for step in steps]), parts=parts, model=model)

    def mfu_of(self, prices: Prices) -> float | None:
        """Of all ranks."""
        peak = prices.peak_flops()
        flops = self.model.training_flops * prices.config.train.global_batch_size
        return None if peak is None else flops / self.seconds / peak


def shape_of(layout: Layout) -> GridShape:
    pipeline, data, context, tensor = layout.grid
    return GridShape(pipeline=pipeline, data=data, context=context, tensor=tensor)


def total(spent: Mapping[str, float]) -> float:
    return sum(spent.values())


def splits_backward(layout: Layout) -> bool:
    """Whether its schedule takes the gradients of weights apart."""
    return _splits(layout.schedule, layout.pipeline, layout.virtual)


@cache
def _splits(schedule: str, pipeline: int, virtual: int | None) -> bool:
    order = compute_order(schedule, pipeline, 1, virtual)
    return any(action.kind is ActionKind.BACKWARD_INPUT for program in order.ranks for action in program)
