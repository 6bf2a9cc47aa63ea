"""How long a training step takes, and what of it goes where: one model for plans and for runs.

Layers have their times (engine.recompute.timing: measured, or priced by a cluster file). Here they become the actions
of the schedule, which the pipeline's simulator runs; then come what data-parallel ranks tell each other, the gradient
norm and the optimizer. Not counted: reading images, evaluation, saving, and ranks that differ in speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import add

import torch
from torch import nn

from engine.assemble import enable_8_bits, placement_of
from engine.clusters import Cluster
from engine.clusters.pricing import Pricer, Spent
from engine.config import Config
from engine.data_traffic import Traffic
from engine.frozen import Frozen, frozen_of
from engine.layer_costs import LayerCosts
from engine.layer_list import outputs_of
from engine.objectives import Objective, make_objective
from engine.precision.precision import precision_of
from engine.prediction import splits, stage_times
from engine.recompute.ahead import flops_again, recompute_schedule
from engine.recompute.assignment import assignment
from engine.recompute.save_sets import save_set
from engine.recompute.timing import META, LayerTimes, Timing
from model import Build, LayerSpec, MicroBatch, makers
from model.kernels import Kernels
from parallel.grid import Grid, GridShape, planned_grid
from parallel.pipeline import Costs, Placement, Schedule, Timeline, behind_forwards, simulate
from parallel.pipeline.post import message_bytes
from parallel.pipeline.readiness import Policy
from parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A predicted step.

    Attributes:
        parts: seconds by what they go into, mean over the ranks of the pipeline; they add up to `seconds`. `products`,
            `attention`, `memory` (passes over it); `tensor` and `context`: what these axes keep the device waiting;
            `data`: the same of gradients and weights over data-parallel ranks, and of the norm; `recompute`;
            `offload`: what copies to and from host memory take longer than their layer; `optimizer`; `bubble`. Of
            measured layers the first ones are `measured` together.
        timeline: of the pipeline. images_per_second: of all ranks. mfu: None where no peak is known.
    """

    parts: Mapping[str, float]
    timeline: Timeline
    images_per_second: float
    mfu: float | None

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.timeline.step_time


def predict_step(
    config: Config,
    shape: GridShape,
    cluster: Cluster,
    *,
    times: Mapping[str, LayerTimes] | None = None,
    sets: Mapping[str, str] | None = None,
    placement: Placement | None = None,
) -> StepTime:
    """The step of a resolved configuration on ranks of this shape.

    Args:
        cluster: the machine. times: of each layer, if they were measured. sets: names of the layers' save sets, if they
            are not as the configuration says. placement: of the layers, if it is not as the configuration says.
    """
    model = StepModel.of(config, shape, cluster, times)
    schedule = config.pipeline(shape).schedule(config.num_micro_batches(shape))
    placement = placement or model.placement(schedule)
    if sets is None:
        given = assignment(config.recompute, model.layers, model.frozen.passes)
        sets = {name: of.name for name, of in given.items()}
    return model.step(model.ahead(schedule, placement, sets), placement, sets)


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """What does not hang on the schedule, the cut of the layers and their save sets: made once for many of these.

    Attributes:
        times: of each layer. loss: of forward and backward of the loss. traffic: of data-parallel ranks.
    """

    config: Config
    cluster: Cluster
    grid: Grid
    build: Build
    objective: Objective
    frozen: Frozen
    times: Mapping[str, LayerTimes]
    loss: tuple[Spent, Spent]
    traffic: Traffic

    @staticmethod
    def of(
        config: Config, shape: GridShape, cluster: Cluster, times: Mapping[str, LayerTimes] | None = None
    ) -> StepModel:
        """For a resolved configuration."""
        if not config.parallel.shared_memory and cluster.between_nodes is not None:
            cluster = replace(cluster, within_node=cluster.between_nodes)  # TCP, within a host, too
        grid, objective = planned_grid(shape, 0), make_objective(config)
        timing, frozen = timing_of(config, grid, objective), frozen_of(config, objective.layers)
        return StepModel(
            config=config,
            cluster=cluster,
            grid=grid,
            build=timing.build,
            objective=objective,
            frozen=frozen,
            times=times or timing.priced(cluster, grid.meter.where),
            loss=_loss_times(objective, timing, grid, cluster),
            traffic=Traffic.of(config, cluster, grid, timing, frozen),
        )

    def on(self, config: Config, shape: GridShape) -> StepModel:
        """The same layers in another layout whose tensor and context ranks, micro-batch and formats are the same."""
        grid = planned_grid(shape, 0)
        traffic = self.traffic.on(config, grid)
        return replace(self, config=config, grid=grid, objective=make_objective(config), traffic=traffic)

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """Of all that is trained."""
        return self.objective.layers

    def placement(self, schedule: Schedule) -> Placement:
        """As a run cuts the layers."""
        return placement_of(self.config, self.layers, self.frozen.passes, schedule)

    def ahead(self, schedule: Schedule, placement: Placement, sets: Mapping[str, str]) -> Schedule:
        """The schedule as a run goes by it, which computes again while it would wait (R)."""
        if self.config.recompute.ahead == "never" or schedule.num_ranks == 1:
            return schedule
        again = flops_again(self.layers, {name: save_set(of) for name, of in sets.items()}, self.config.model)
        policy = self.config.parallel.schedule_policy
        return recompute_schedule(schedule, placement, self.layers, self.frozen.passes, again, policy)

    def step(self, schedule: Schedule, placement: Placement, sets: Mapping[str, str]) -> StepTime:
        """With this schedule, the layers of each stage, and the names of their save sets."""
        split = splits(schedule)
        stages = [self.stage(number, placement, sets, split=split) for number in range(schedule.num_stages)]
        ranks = range(schedule.num_ranks)
        held = [[self.layers[i].name for s in placement.on(r) for i in placement.layers[s]] for r in ranks]
        last = [
            sum(_total(stages[s]["backward"]) + _total(stages[s]["weight"]) for s in placement.on(r)) for r in ranks
        ]
        tails = [self.traffic.at_the_end(names, backward) for names, backward in zip(held, last, strict=True)]
        updates = [self.traffic.update(names) for names in held]
        norm = self.traffic.norm(held)
        of = {what: tuple(_total(stage[what]) for stage in stages) for what in stages[0]}
        costs = replace(
            self._messages(placement),
            forward=of["forward"],
            backward_input=of["backward"],
            backward_weight=of["weight"],
            recompute=of["recompute"],
            norm=norm,
            optimizer=tuple(map(add, tails, updates)),
        )
        before = self.objective.forward_passes
        timeline = simulate(behind_forwards(schedule, before), costs, self._policy(schedule))
        parts: dict[str, float] = defaultdict(float)
        for rank in ranks:
            for stage in placement.on(rank):
                for what, spent in stages[stage].items():
                    _add(parts, spent, schedule.num_micro_batches * (1 + before if what == "forward" else 1))
            _add(parts, {"data": tails[rank] + norm, "optimizer": updates[rank], "bubble": timeline.bubble[rank]})
        return self._result({name: value / len(ranks) for name, value in parts.items() if value}, timeline)

    def _result(self, parts: Mapping[str, float], timeline: Timeline) -> StepTime:
        images, flops = self.config.train.global_batch_size / timeline.step_time, self.training_flops
        peak = self.cluster.peak.tflops.get(self.config.precision.dtype)
        mfu = None if peak is None else images * flops / (self.grid.shape.world_size * peak * 1e12)
        return StepTime(parts=parts, timeline=timeline, images_per_second=images, mfu=mfu)

    @property
    def training_flops(self) -> int:
        """As of `engine.assembly.Assembly`."""
        return sum(layer.flops * n for layer, n in zip(self.layers, self.frozen.passes, strict=True))

    def _policy(self, schedule: Schedule) -> Policy:
        return self.config.parallel.schedule_policy if schedule.num_ranks > 1 else "static"

    def stage(
        self, number: int, placement: Placement, sets: Mapping[str, str], *, split: bool
    ) -> dict[str, dict[str, float]]:
        """Of one micro-batch, by what: its forward, its backward (the first half, where it is split), the weights'
        half, computing again."""
        named = [(self.layers[i].name, self.frozen.passes[i]) for i in placement.layers[number]]
        found = stage_times(((self.times[name], n, sets.get(name, "all")) for name, n in named), split=split)
        for index, (name, passes) in zip(placement.layers[number], named, strict=True):
            if copies := self._copies(index, sets.get(name, "all")):
                more = self.times[name].unhidden(copies, passes, splits=split)
                for what, seconds in zip(("forward", "backward"), more, strict=True):
                    _add(found[what], {"offload": seconds})
        if number == placement.last:
            _add(found["forward"], self.loss[0])
            _add(found["backward"], self.loss[1])
        names = [name for name, _ in named]
        for what, spent in self.traffic.within(names, {key: _total(of) for key, of in found.items()}, split).items():
            _add(found[what], {"data": spent})
        return found

    def _copies(self, layer: int, sets: str) -> float:
        """Seconds that what a layer has in host memory takes on its way there, and on its way back."""
        of = save_set(sets)
        if not of.offloads:
            return 0.0
        return self.cluster.to_host(LayerCosts.of(self.config, self.grid.shape, 0).cost(layer, of).away)

    def _messages(self, placement: Placement) -> Costs:
        """What the simulator is to know of messages: sizes, latency, and the rate of the slowest link."""
        ranks, size = placement.ranks, self.config.train.micro_batch_size
        assert size is not None
        outputs = outputs_of(self.layers, self.frozen.passes, size, self.build)
        flows = [tuple(outputs[maker.name] for maker in makers(self.layers, of.stop)) for of in placement.layers[:-1]]
        sizes = [message_bytes(flow) for flow in flows]
        back = [message_bytes(tuple(spec for spec in flow if spec.carries_gradient)) for flow in flows]
        apart = self.grid.shape.world_size // self.grid.shape.pipeline
        pairs = {(a * apart, b * apart) for a, b in pairwise(ranks) if a != b}
        if not pairs:
            return Costs()
        most = max(sizes)
        cost = partial(self.cluster.collective, "message")
        latency, whole = max(cost(0, pair) for pair in pairs), max(cost(most, pair) for pair in pairs)
        rate = most / max(whole - latency, 1e-12)
        return Costs(
            output_bytes=tuple(map(float, sizes)),
            gradient_bytes=tuple(map(float, back)),
            latency=latency,
            bandwidth=rate,
        )


def timing_of(config: Config, grid: Grid, objective: Objective) -> Timing:
    """The layers of a resolved configuration, to be timed."""
    layers, precision = objective.layers, precision_of(config.precision, objective.layers)
    assert config.train.micro_batch_size is not None
    tp = TensorParallel(axis=grid.tensor, sequence_parallel=config.parallel.sequence_parallel)
    build = Build(
        config=config.model, tp=tp, context=grid.context, seed=config.train.seed, kernels=Kernels(config.kernels),
        precision=precision, norm_from_output=config.recompute.norm_from_output,
    )  # fmt: skip

    def prepare(module: nn.Module) -> None:
        enable_8_bits(config.precision, [module], precision, next(module.parameters()).device)

    return Timing(layers=layers, build=build, batch_size=config.train.micro_batch_size, prepare=prepare)


def _loss_times(objective: Objective, timing: Timing, grid: Grid, cluster: Cluster) -> tuple[Spent, Spent]:
    """Of the loss of a micro-batch, forward and backward."""
    build, last = timing.build, timing.layers[-1]
    shape, dtype = last.boundary(timing.batch_size, build), build.precision.of_layer(last.name)
    taught = [shape] * len(last.rides)  # teachers' logits
    forms: list[tuple[int, ...]] = [shape, *taught]  # logits
    if last.joins:  # embeddings of both sides, scale, bias, what a teacher makes of both
        above = makers(timing.layers, len(timing.layers) - 1)[2:]
        forms = [shape, shape, (), (), *(of.boundary(timing.batch_size, build) for of in above)]
    outputs = tuple(torch.empty(form, dtype=dtype, device=META).requires_grad_() for form in forms)
    size = timing.batch_size * last.per_sample
    zeros, ones = torch.zeros(size, dtype=torch.int64, device=META), torch.ones(size, device=META)
    batch = MicroBatch(images=None, labels=zeros, sample_ids=zeros, weights=ones)
    with Pricer(cluster) as pricer, pricer.listening(grid.meter.where):
        loss = objective.loss_share(outputs, batch, grid, 1.0)
        forward = dict(pricer.spent)
        pricer.spent.clear()
        loss.backward()
    return forward, dict(pricer.spent)


def _add(to: dict[str, float], spent: Spent, times: int = 1) -> None:
    for name, seconds in spent.items():
        to[name] = to.get(name, 0.0) + times * seconds


def _total(spent: Spent) -> float:
    return sum(spent.values())
