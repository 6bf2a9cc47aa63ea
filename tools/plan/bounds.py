"""What a layout takes at least, found with little work: bounds of the times that `tools.plan.evaluate` finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from engine.clusters import Cluster
from engine.clusters.cluster import Curve
from engine.config import Config
from engine.data_traffic import Traffic
from engine.layer_costs import LayerCosts
from engine.plan import stage_kind, static_bytes
from engine.recompute.assignment import may_drop
from engine.recompute.costs import LayerCost
from engine.recompute.timing import kind_of
from engine.step_time import StepModel
from parallel.pipeline import Placement, Schedule
from tools.plan.layouts import Key, Layout
from tools.plan.prices import Prices, shape_of, splits_backward, total
from tools.plan.room import Block, Kept, Moment, Room, fullest

_FEW = 2  # passes over the ranks that are enough for a bound


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layout that no save sets bring within the budget: bytes that it needs at least."""

    layout: Layout
    least: int


@dataclass
class Bounds(Prices):
    """Of the layouts of a configuration on ranks of a cluster: none is above what `Evaluator.exactly` finds."""

    _sets: dict[object, dict[str, LayerCost]] = field(default_factory=dict)
    _found: dict[object, tuple[Kept, ...]] = field(default_factory=dict)
    _room: dict[Layout, list[Room]] = field(default_factory=dict)

    def least_of(self, key: Key, micro_batch: int) -> float:
        """Seconds that any layout of a key takes at least whose micro-batches are so large or smaller."""
        return self._share(key, self._model(key, micro_batch, _optimistic(self.cluster)), micro_batch)

    def least_work(self, key: Key, micro_batch: int) -> float:
        """Seconds that any layout of a key and micro-batch takes at least: its ranks compute all the time."""
        return self._share(key, self._model(key, micro_batch, self.cluster), micro_batch)

    def _share(self, key: Key, model: StepModel, micro_batch: int) -> float:
        work = total(model.loss[0]) + total(model.loss[1])
        for layer, passes in zip(model.layers, model.frozen.passes, strict=True):
            work += min(model.times[layer.name].seconds(passes, splits=splits) for splits in (False, True))
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
        times = [[total(stage[what]) for what in ("forward", "backward", "weight")] for stage in stages]
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
            return self._choices(layout, place) if may_drop(model.layers, model.frozen.passes, place) else ()

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
            self._sets[at] = LayerCosts.of(config, shape_of(layout), 0).by_set(place, splits=splits)
        return self._sets[at]

    def _static(self, layout: Layout, model: StepModel, schedule: Schedule, placement: Placement, rank: int) -> int:
        """Bytes that are there all the time, the same for ranks with equal layers."""

        def built() -> Config:  # the model's own may be of another schedule
            config = self._few(layout, self._resolved(layout))
            return replace(config, recompute=config.recompute.keeping_all())

        on_cpu = self.cluster.device_type == "cpu"
        kinds = tuple(
            stage_kind(model.layers, placement.layers[s], model.build, model.frozen) for s in placement.on(rank)
        )
        first = rank * (self.ranks // layout.pipeline)
        return static_bytes(model.config, shape_of(layout), first, self.memory, kinds, on_cpu=on_cpu, cut=built)

    def least(self, layout: Layout) -> float:
        """Seconds that it takes at least: the schedule runs, and nothing is computed again. Each of the first
        micro-batches adds no more than a later one.
        """
        model = self._priced(layout)
        sets = dict.fromkeys((layer.name for layer in model.layers), "all")
        self.counts["simulated"] += 1
        return self._by_lengths(model, layout, sets, self._lengths(layout, _FEW)).seconds


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
