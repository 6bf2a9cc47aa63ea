"""What `recompute.policy: auto` has to solve: the layers of a configuration, and what a rank with some of them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache

from engine.assembly import Assembly
from engine.config import Config
from engine.errors import ConfigError
from engine.layer_costs import LayerCosts
from engine.plan import planned, stage_kind, static_bytes, step_bytes
from engine.recompute.assignment import has_merge, may_drop
from engine.recompute.costs import LayerCost
from engine.recompute.cut import Problem
from engine.recompute.offload import LOADS_IN_FLIGHT
from engine.recompute.ranks import Layer, Pace, Place
from engine.recompute.save_sets import LADDER, SaveSet, save_set
from model import ride_of
from parallel.grid import GridShape
from parallel.pipeline import Costs, simulate
from parallel.pipeline.post import message_bytes

Seconds = Callable[[str, str], float]
"""What computing a layer again takes for a micro-batch: its name, that of a save set."""


Copies = Callable[[str, int], float]
"""What copies to host memory and back add to the time of a layer for a micro-batch: its name, bytes one way."""


def problems_of(
    config: Config,
    shape: GridShape,
    memory: float,
    seconds: Seconds,
    *,
    on_cpu: bool,
    passes: Callable[[str], float] = lambda layer: 0.0,
    copies: Copies = lambda layer, count: 0.0,
) -> tuple[list[Problem], tuple[range, ...]]:
    """What is to be solved, and the stages as they are cut without it.

    With recompute.offload auto there are several problems, of which the best solution is taken: first one without
    offloading, then, since what is in flight takes memory by the largest load of a rank, one for each bound on that.
    """
    if again := config.pipeline(shape).schedule(config.num_micro_batches(shape)).recomputes:
        raise ConfigError(
            f"parallel.schedule {config.parallel.schedule} has recomputes ({again[0]} and so on), but recompute.policy "
            "auto places them itself, if they fit: leave them out, or name the save sets"
        )
    keeps_all = replace(config, recompute=config.recompute.keeping_all())
    a = planned(keeps_all, shape, 0, memory, on_cpu=on_cpu)
    costs = LayerCosts.of(a.config, shape, 0, on_cpu=on_cpu)
    layers = [_layer(a, place, costs, seconds, passes) for place in range(len(a.layers))]

    def static(rank: int, stages: Sequence[range]) -> int:
        def cut() -> Config:
            numbered = dict(zip(a.schedule.stages_of(rank), stages, strict=True))
            counts = tuple(map(len, _whole_cut(numbered, a.schedule.num_stages, len(layers))))
            return replace(keeps_all, parallel=replace(config.parallel, layers_per_stage=counts))

        first = rank * (shape.world_size // shape.pipeline)
        kinds = tuple(stage_kind(a.layers, own, a.build, a.frozen) for own in stages)
        held = static_bytes(keeps_all, shape, first, memory, kinds, on_cpu=on_cpu, cut=cut)
        return held + step_bytes(a, stages)

    budget = config.recompute.budget(memory)
    pace = _pace(config, shape)
    first = Problem(layers=layers, schedule=a.schedule, budget=budget, static=static, pace=pace)
    if config.recompute.offload == "never" or on_cpu:
        return [first], a.placement.layers

    def bounded(load: int) -> Problem:
        return replace(
            first,
            layers=[_offloading(a, costs, place, of, load, copies) for place, of in enumerate(layers)],
            static=lambda rank, stages: static(rank, stages) + LOADS_IN_FLIGHT * load,
        )

    return [first, *map(bounded, _loads(a, costs))], a.placement.layers


def _loads(a: Assembly, costs: LayerCosts) -> list[int]:
    """The sizes that loads of blocks may have."""
    places = [place for place in range(len(a.layers)) if _may_offload(a, place)]
    return sorted({costs.cost(place, save_set(f"{name}+offload")).away for place in places for name in LADDER} - {0})


def _may_offload(a: Assembly, place: int) -> bool:
    """A block that keeps something, and takes no merge along."""
    return may_drop(a.layers, a.frozen.passes, place) and not has_merge(a.layers, place)


def _offloading(a: Assembly, costs: LayerCosts, place: int, layer: Layer, load: int, copies: Copies) -> Layer:
    """The layer, which may have what rungs of the ladder keep in host memory, up to so many bytes."""
    if not _may_offload(a, place):
        return layer

    def by_set(where: Place) -> Mapping[str, LayerCost]:
        found = dict(layer.costs(where))
        for name in [name for name in LADDER if name in found]:
            cost = costs.cost(place, save_set(f"{name}+offload"), **asdict(where))
            if 0 < cost.away <= load:
                seconds = found[name].seconds + copies(a.layers[place].name, cost.away)
                found[f"{name}+offload"] = replace(cost, seconds=seconds)
        return found

    return replace(layer, costs=cache(by_set))


def _pace(config: Config, shape: GridShape) -> Pace:
    """A step as simulated, of few micro-batches if it has many: the others take as long as the busiest rank's."""
    pipeline, count, p = config.pipeline(shape), config.num_micro_batches(shape), shape.pipeline
    short = count if pipeline.micro_batches is not None or count < 5 * p else 4 * p + count % p
    schedule = pipeline.schedule(short)

    def seconds(plain: Sequence[float], again: Sequence[float]) -> float:
        third = tuple(x / 3 for x in plain)
        costs = Costs(forward=third, backward_input=third, backward_weight=third, recompute=tuple(again))
        busy = [0.0] * schedule.num_ranks
        for rank, *each in zip(schedule.stage_to_rank, plain, again, strict=True):
            busy[rank] += sum(each)
        made = simulate(schedule, costs, config.parallel.schedule_policy if p > 1 else "static").makespan
        return made + (count - short) * max(busy)

    return seconds


def _layer(a: Assembly, place: int, costs: LayerCosts, seconds: Seconds, passes: Callable[[str], float]) -> Layer:
    """What there is to know of a layer of the model, wherever stages are cut."""
    spec, merges = a.layers[place], has_merge(a.layers, place)

    def by_set(where: Place) -> Mapping[str, LayerCost]:
        found: Mapping[str, LayerCost]
        if may_drop(a.layers, a.frozen.passes, place):
            found = costs.by_set(place, **asdict(where))
            if merges:  # which would go with it
                found = {name: cost for name, cost in found.items() if "merge" not in save_set(name).drops}
        else:
            found = {"all": costs.cost(place, SaveSet(), **asdict(where))}
        return {name: replace(cost, seconds=seconds(spec.name, name)) for name, cost in found.items()}

    behind, before = a.boundary(place + 1), a.boundary(place)
    times = passes(spec.name), seconds(spec.name, "input")
    return Layer(
        kind=(costs.kind(place), merges, a.frozen.passes[place], *times),
        costs=cache(by_set),
        seconds=times[0],
        ride=ride_of(a.layers, place),
        output=message_bytes(behind),
        input_gradient=message_bytes(tuple(spec for spec in before if spec.carries_gradient)),
    )


def _whole_cut(known: Mapping[int, range], stages: int, layers: int) -> list[range]:
    """Some cut in which those stages have those layers."""
    found = list[range]()
    for stage in range(stages):
        start = found[-1].stop if found else 0
        later = min((number for number in known if number > stage), default=stages)
        end = known[later].start if later in known else layers
        found.append(known.get(stage, range(start, start + 1 if stage + 1 < later else end)))
    return found
