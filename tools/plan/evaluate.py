"""What a layout takes: bounds of its time that cost little, and its time and memory as a run has them.

Layers are priced once for each number of tensor and context ranks and size of a micro-batch. Steps of many
micro-batches are those of few and a steady rest: between two lengths beyond all that is special at the ends of a step,
time goes straight, and the peak of memory is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import ceil

from engine.clusters import Cluster
from engine.clusters.cluster import Curve
from engine.config import Config, RecomputeConfig
from engine.data_traffic import Traffic
from engine.layer_costs import LayerCosts
from engine.plan import stage_kind, static_bytes
from engine.recompute.assignment import assignment
from engine.recompute.costs import LayerCost
from engine.recompute.timing import kind_of
from engine.recompute_choice import Choice, TooLittleError, choose
from engine.step_time import StepModel, StepTime
from parallel.grid import GridShape
from parallel.pipeline import Placement, Schedule
from parallel.pipeline.actions import ActionKind
from parallel.pipeline.communication import insert_communication
from parallel.pipeline.schedules import compute_order, virtual_stages_of
from tools.plan.layouts import Key, Layout
from tools.plan.room import Block, Kept, Moment, Room, fullest

_GB = 1e9
_PASSES = 4  # over the ranks, after which a schedule may repeat itself; else after twice as many
_FEW = 2  # that are enough for a bound
_SETTLED = 1e-7


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one layout.

    Attributes:
        config: resolved, with a save set for each block. parts: seconds by what, as of StepTime. peaks: planned bytes
            of each pipeline rank.
    """

    layout: Layout
    config: Config
    seconds: float
    parts: Mapping[str, float]
    images_per_second: float
    mfu: float | None
    peaks: tuple[int, ...]

    @property
    def peak(self) -> int:
        """Of the fullest rank."""
        return max(self.peaks)


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layout that no save sets bring within the budget: bytes that it needs at least."""

    layout: Layout
    least: int


@dataclass
class Evaluator:
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
    _sets: dict[object, dict[str, LayerCost]] = field(default_factory=dict)
    _found: dict[object, tuple[Kept, ...]] = field(default_factory=dict)
    _room: dict[Layout, list[Room]] = field(default_factory=dict)
    _known: dict[tuple[Layout, bool], list[tuple[int, Prediction | Misfit]]] = field(default_factory=dict)
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

    # -- bounds -------------------------------------------------------------------------------------------------------

    def least_of(self, key: Key, micro_batch: int) -> float:
        """Seconds that any layout of a key takes at least whose micro-batches are so large or smaller."""
        return self._share(key, self._model(key, micro_batch, _optimistic(self.cluster)), micro_batch)

    def least_work(self, key: Key, micro_batch: int) -> float:
        """Seconds that any layout of a key and micro-batch takes at least: its ranks compute all the time."""
        return self._share(key, self._model(key, micro_batch, self.cluster), micro_batch)

    def _share(self, key: Key, model: StepModel, micro_batch: int) -> float:
        work = _total(model.loss[0]) + _total(model.loss[1])
        for layer, passes in zip(model.layers, model.frozen.passes, strict=True):
            times = model.times[layer.name]
            halves = _total(times.backward_input), _total(times.backward_weight)
            backward = {1: 0.0, 2: halves[0], 3: min(_total(times.backward), sum(halves))}[passes]
            work += _total(times.forward) + backward
        images = self.config.train.global_batch_size * key.tensor * key.context / self.ranks
        return work / micro_batch * images

    def least_busy(self, layout: Layout) -> float:
        """Seconds that it takes at least, whatever its ZeRO stage."""
        model = self._priced(layout)
        return max(self._busy(layout, replace(model, traffic=_none_of(model.traffic))))

    def _busy(self, layout: Layout, model: StepModel) -> list[float]:
        """By rank: it begins when the first forward gets to it, works all the time, and where backwards are whole,
        others work after it.
        """
        schedule = self._schedule(layout, self._lengths(layout)[0])
        placement, splits = self._placement(model, schedule), splits_backward(layout)
        stages = [model.stage(s, placement, {}, split=splits) for s in range(schedule.num_stages)]
        times = [[_total(stage[what]) for what in ("forward", "backward", "weight")] for stage in stages]
        count, found = self._count(layout), []
        for rank in range(schedule.num_ranks):
            own = placement.on(rank)
            before = sum(f + b * (not splits) for f, b, _ in times[: own[0]])
            found.append(before + count * sum(sum(times[s]) for s in own))
        return found

    def least_again(self, layout: Layout, budget: int, *, closely: bool) -> float | Misfit:
        """Seconds that it takes at least with what it must compute again to stay within a budget.

        Args:
            closely: states of the rank that takes longest as they are allocated, which takes longer to find; else
                weights, masters and gradients.
        """
        model, schedule = self._priced(layout), self._schedule(layout, self._lengths(layout)[0])
        placement, rooms, count = self._placement(model, schedule), self._rooms(layout), self._count(layout)
        busy, again, lacks = self._busy(layout, model), list[float](), list[float]()
        for rank, room in enumerate(rooms):
            seconds, lack = room.least_again(budget - _least_static(model, placement, rank))
            again.append(busy[rank] + count * seconds)
            lacks.append(lack)
        if closely and not max(lacks):
            rank = max(range(len(rooms)), key=lambda rank: again[rank])
            held = self._static(layout, model, schedule, placement, rank)
            seconds, lacks[rank] = rooms[rank].least_again(budget - held)
            again[rank] = max(again[rank], busy[rank] + count * seconds)
        if lack := max(lacks):
            return Misfit(layout=layout, least=budget + ceil(lack))
        return max(again)

    def _rooms(self, layout: Layout) -> list[Room]:
        """Of each rank, what its blocks may keep at the fullest moment: the same for all ZeRO stages."""
        where = replace(layout, zero=0)
        if where not in self._room:
            model, schedule = self._priced(layout), self._schedule(layout, self._lengths(layout)[0])
            placement = self._placement(model, schedule)
            self._room[where] = [
                self._room_of(layout, model, placement, fullest(program)) for program in schedule.ranks
            ]
        return self._room[where]

    def _room_of(self, layout: Layout, model: StepModel, placement: Placement, at: Moment) -> Room:
        def of(place: int) -> tuple[Kept, ...]:
            return self._choices(layout, place) if _may_drop(model, place) else ()

        blocks = [
            Block(choices=tuple((alive * c.kept + at.deferred.get(stage, 0) * c.deferred, c.again) for c in choices))
            for stage, alive in at.alive.items()
            for place in placement.layers[stage]
            if (choices := of(place))
        ]
        last = of(placement.layers[at.backward][-1])
        return Room(blocks=blocks, own=min((c.backward - c.kept for c in last), default=0.0))

    def _choices(self, layout: Layout, place: int) -> tuple[Kept, ...]:
        """Of a block and a micro-batch, by save set. Bytes that stay go straight with the number of images; those of a
        backward, which are the most of several moments, are no fewer than if they did.
        """
        key, model = Key(tensor=layout.tensor, sequence=layout.sequence, context=layout.context), self._priced(layout)
        name, splits = model.layers[place].name, splits_backward(layout)
        kind, more = kind_of(model.layers[place], model.build), layout.micro_batch - 1
        if (at := (key, layout.micro_batch, kind, splits)) not in self._found:
            one, two = (self._costs(key, images, place, kind, splits) for images in (1, 2))

            def of(sets: str) -> Kept:
                a, b = one[sets], two[sets]
                return Kept(
                    kept=a.kept + more * (b.kept - a.kept),
                    deferred=a.deferred + more * (b.deferred - a.deferred),
                    backward=a.backward + more * (b.backward - a.backward),
                    again=model.times[name].recompute_seconds(sets),
                )

            self._found[at] = tuple(of(sets) for sets in one.keys() & two.keys())
        return self._found[at]

    def _costs(self, key: Key, images: int, place: int, kind: object, splits: bool) -> dict[str, LayerCost]:
        """Of so many images, by save set."""
        if (at := (key, images, kind, splits)) not in self._sets:
            layout, config = self._alone(key, images)
            config = config if config.kernels == "reference" else replace(config, kernels="native")  # as `planned`
            self._sets[at] = LayerCosts.of(config, _shape(layout), 0).by_set(place, splits=splits)
        return self._sets[at]

    def _static(self, layout: Layout, model: StepModel, schedule: Schedule, placement: Placement, rank: int) -> int:
        """Bytes that are there all the time, the same for ranks with equal layers."""

        def built() -> Config:  # the model's own may be of another schedule
            return replace(self._few(layout, self._resolved(layout)), recompute=RecomputeConfig(ahead="never"))

        on_cpu = self.cluster.device_type == "cpu"
        kinds = tuple(
            stage_kind(model.layers, placement.layers[s], model.build, model.frozen) for s in placement.on(rank)
        )
        first = rank * (self.ranks // layout.pipeline)
        return static_bytes(model.config, _shape(layout), first, self.memory, kinds, on_cpu=on_cpu, cut=built)

    def _few(self, layout: Layout, config: Config) -> Config:
        """The same with as few micro-batches as tell how it goes on."""
        short = self._lengths(layout)[0]
        return replace(config, train=replace(config.train, global_batch_size=short * layout.micro_batch * layout.data))

    def least(self, layout: Layout) -> float:
        """Seconds that it takes at least: the schedule runs, and nothing is computed again. Each of the first
        micro-batches adds no more than a later one.
        """
        model = self._priced(layout)
        sets = dict.fromkeys((layer.name for layer in model.layers), "all")
        self.counts["simulated"] += 1
        return self._by_lengths(model, layout, sets, self._lengths(layout, _FEW)).seconds

    # -- what it really takes -----------------------------------------------------------------------------------------

    def exactly(self, layout: Layout, budget: int | None = None, *, cuts: bool = False) -> Prediction | Misfit:
        """With the save sets that take the least time within the budget.

        Args:
            cuts: whether the layers of stages are found together with them, which takes longer; else they are as they
                are cut without a budget.
        """
        budget = budget or self.budget
        for before, found in self._known.get((layout, cuts), ()):
            if before >= budget and (found.least > budget if isinstance(found, Misfit) else found.peak <= budget):
                return found
        found = self._exactly(layout, budget, cuts)
        self._known.setdefault((layout, cuts), []).append((budget, found))
        return found

    def cut(self, found: Prediction, *, several: bool = False) -> Prediction:
        """The same, or, if that is quicker, with layers cut into stages together with the save sets.

        Args:
            several: where ranks have several stages, too, which takes many seconds.
        """
        layout = found.layout
        if layout.pipeline == 1 or (not several and virtual_stages_of(layout.schedule, layout.virtual) > 1):
            return found
        other = self.exactly(layout, cuts=True)
        return other if isinstance(other, Prediction) and other.seconds < found.seconds else found

    def _exactly(self, layout: Layout, budget: int, cuts: bool) -> Prediction | Misfit:
        self.counts["solved"] += 1
        model, config = self._priced(layout), self._resolved(layout)
        small = self._few(layout, config)
        small = replace(small, recompute=replace(config.recompute, memory_budget=budget))
        counts = dict(zip((layer.name for layer in model.layers), model.frozen.passes, strict=True))
        splits, on_cpu = splits_backward(layout), self.cluster.device_type == "cpu"

        def seconds(layer: str, of: str) -> float:
            return model.times[layer].recompute_seconds(of)

        def passes(layer: str) -> float:
            return model.times[layer].seconds(counts[layer], splits=splits)

        def copies(layer: str, count: int) -> float:
            times = model.times[layer]
            ways = times.forward, times.backwards(counts[layer], splits=splits)[0]
            return sum(max(0.0, self.cluster.to_host(count) - _total(spent)) for spent in ways)

        try:
            choice: Choice = choose(
                small, _shape(layout), self.memory, seconds, on_cpu=on_cpu, passes=passes if cuts else None,
                copies=copies,
            )  # fmt: skip
        except TooLittleError as error:
            return Misfit(layout=layout, least=error.smallest)
        cut = choice.config.parallel.layers_per_stage
        config = replace(
            config,
            recompute=choice.config.recompute,
            parallel=replace(config.parallel, layers_per_stage=cut),
        )
        sets = {name: of.name for name, of in assignment(config.recompute, model.layers, model.frozen.passes).items()}
        step = self._step(replace(model, config=config), layout, sets)
        return Prediction(
            layout=layout,
            config=config,
            seconds=step.seconds,
            parts=step.parts,
            images_per_second=config.train.global_batch_size / step.seconds,
            mfu=step.mfu_of(self),
            peaks=choice.peaks,
        )

    def peak_flops(self) -> float | None:
        """FLOP/s of all ranks."""
        peak = self.cluster.peak.tflops.get(self.config.precision.dtype)
        return None if peak is None else peak * 1e12 * self.ranks

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, model: StepModel, layout: Layout, sets: Mapping[str, str]) -> _Length:
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
    ) -> _Length:
        steps = [self._of_length(model, layout, sets, n) for n in dict.fromkeys(lengths)]
        return _Length.between(steps, lengths, self._count(layout), model)

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
            self._on[key] = self._model(of, layout.micro_batch, self.cluster).on(self._resolved(layout), _shape(layout))
        return self._on[key]

    def _model(self, key: Key, micro_batch: int, cluster: Cluster) -> StepModel:
        where = key, micro_batch, cluster is self.cluster
        if where not in self._models:
            self.counts["priced"] += 1
            layout, config = self._alone(key, micro_batch)
            self._models[where] = StepModel.of(config, _shape(layout), cluster)
        return self._models[where]

    def _alone(self, key: Key, micro_batch: int) -> tuple[Layout, Config]:
        """On as few ranks as can be, for one micro-batch."""
        layout = Layout(tensor=key.tensor, sequence=key.sequence, context=key.context, micro_batch=micro_batch)
        config = replace(self.config, train=replace(self.config.train, global_batch_size=micro_batch))
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
class _Length:
    """A step of any length."""

    seconds: float
    parts: Mapping[str, float]
    model: StepModel

    @staticmethod
    def between(steps: Sequence[StepTime], lengths: tuple[int, int], count: int, model: StepModel) -> _Length:
        short, long = lengths
        share = 0.0 if short == long else (count - short) / (long - short)

        def at(values: Sequence[float]) -> float:
            return values[0] + share * (values[-1] - values[0])

        names = dict.fromkeys(name for step in steps for name in step.parts)
        parts = {name: at([step.parts.get(name, 0.0) for step in steps]) for name in names}
        return _Length(seconds=at([step.seconds for step in steps]), parts=parts, model=model)

    def mfu_of(self, evaluator: Evaluator) -> float | None:
        """Of all ranks."""
        peak = evaluator.peak_flops()
        passes = zip(self.model.layers, self.model.frozen.passes, strict=True)
        flops = sum(layer.flops * n for layer, n in passes) * evaluator.config.train.global_batch_size
        return None if peak is None else flops / self.seconds / peak


class _NoTraffic(Traffic):
    """Nothing is told, and nothing updated."""

    def within(self, names: Sequence[str], busy: Mapping[str, float], splits: bool) -> dict[str, float]:
        return {}

    def at_the_end(self, names: Sequence[str], last_backward: float) -> float:
        return 0.0

    def update(self, names: Sequence[str]) -> float:
        return 0.0

    def norm(self, held: Sequence[Sequence[str]]) -> float:
        return 0.0


def _none_of(of: Traffic) -> Traffic:
    return _NoTraffic(**of.__dict__)


def _optimistic(cluster: Cluster) -> Cluster:
    """A machine that is as fast with anything small as with the fastest that is smaller: no curve of it falls."""

    def rising(value: object) -> object:
        if isinstance(value, Curve):
            most, points = 0.0, []
            for x, y in value.points:
                most = max(most, y)
                points.append((x, most))
            return Curve(tuple(points))
        if isinstance(value, dict):
            return {key: rising(part) for key, part in value.items()}
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{name: rising(getattr(value, name)) for name in value.__dataclass_fields__})  # type: ignore[type-var]
        return value

    found = rising(cluster)
    assert isinstance(found, Cluster)
    return found


def _least_static(model: StepModel, placement: Placement, rank: int) -> int:
    """Bytes of weights, masters and gradients."""
    config, shards = model.config, len(model.traffic.ranks)
    names = [model.layers[i].name for s in placement.on(rank) for i in placement.layers[s]]
    numbers = sum(model.traffic.numbers[name] for name in names)
    zero, wide = config.parallel.zero_stage, config.precision.dtype == "fp32"
    narrow = config.parallel.gradient_dtype == "weights" and not wide
    held = sum(model.traffic.nbytes[name] for name in names) // (shards if zero == 3 else 1)
    held += numbers * (2 if narrow else 4) // (shards if zero >= 2 else 1)
    return held + numbers * (0 if wide else 4) // (shards if zero else 1)


def _may_drop(model: StepModel, place: int) -> bool:
    return model.layers[place].name.startswith("blocks.") and model.frozen.passes[place] > 1


def _shape(layout: Layout) -> GridShape:
    pipeline, data, context, tensor = layout.grid
    return GridShape(pipeline=pipeline, data=data, context=context, tensor=tensor)


def _total(spent: Mapping[str, float]) -> float:
    return sum(spent.values())


def splits_backward(layout: Layout) -> bool:
    """Whether its schedule takes the gradients of weights apart."""
    return _splits(layout.schedule, layout.pipeline, layout.virtual)


@cache
def _splits(schedule: str, pipeline: int, virtual: int | None) -> bool:
    order = compute_order(schedule, pipeline, 1, virtual)
    return any(action.kind is ActionKind.BACKWARD_INPUT for program in order.ranks for action in program)
