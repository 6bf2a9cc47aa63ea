"""What a training step is predicted to cost before anything has run: for the simulator, from times of layers.

Times are measured or priced (`engine.recompute.timing`); where nobody has either they are FLOPs (`flop_times`).
Messages take none here: `engine.step_time` adds them, and what data-parallel ranks tell each other, for a cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.recompute.timing import LayerTimes
from model import LayerSpec
from parallel.pipeline import Costs, Placement, Schedule
from parallel.pipeline.actions import ActionKind

_ALL = "", ""


def predicted_costs(
    schedule: Schedule,
    placement: Placement,
    layers: Sequence[LayerSpec],
    passes: Sequence[int],
    times: Mapping[str, LayerTimes],
    sets: Mapping[str, str],
) -> Costs:
    """Of the schedule's actions.

    Args:
        layers: of the whole model. passes: of each, as `engine.frozen` counts. times: by the layers' names. sets: names
            of the layers' save sets; others keep all.
    """
    split = splits(schedule)
    each = [(times[l.name], n, sets.get(l.name, "all")) for l, n in zip(layers, passes, strict=True)]
    stages = [stage_times((each[i] for i in of), split=split) for of in placement.layers]
    forward, backward, weight, recompute = (
        tuple(sum(stage[what].values()) for stage in stages) for what in ("forward", "backward", "weight", "recompute")
    )
    return Costs(forward=forward, backward_input=backward, backward_weight=weight, recompute=recompute)


def splits(schedule: Schedule) -> bool:
    """Whether backwards of a schedule come in two parts."""
    return any(a.kind is ActionKind.BACKWARD_INPUT for program in schedule.ranks for a in program)


def stage_times(layers: Iterable[tuple[LayerTimes, int, str]], *, split: bool) -> dict[str, dict[str, float]]:
    """Of one micro-batch on a stage: its `forward`, its `backward` (the first half, where it is split), the `weight`s'
    half and what it has to `recompute`, each by what it goes into.

    Args:
        layers: of each its times, passes and the name of its save set.
    """
    found: dict[str, dict[str, float]] = {what: {} for what in ("forward", "backward", "weight", "recompute")}
    for times, passes, save_set in layers:
        backward, weight = times.backwards(passes, splits=split)
        again = {"recompute": times.recompute_seconds(save_set)} if passes > 1 else {}
        for what, spent in zip(found, (times.forward, backward, weight, again), strict=True):
            for name, seconds in spent.items():
                found[what][name] = found[what].get(name, 0.0) + seconds
    return found


def flop_times(layers: Sequence[LayerSpec], again: Sequence[int]) -> dict[str, LayerTimes]:
    """FLOPs per image in the place of seconds, where there are none.

    Args:
        again: of each layer, what its save set has computed again (`engine.recompute.ahead.flops_again`).
    """

    def of(flops: float, more: float) -> LayerTimes:
        once, twice = {"products": flops}, {"products": 2 * flops}
        return LayerTimes(
            forward=once, backward=twice, backward_input=once, backward_weight=once, regions={_ALL: more},
            again=lambda save_set: {_ALL: 1.0},
        )  # fmt: skip

    return {layer.name: of(float(layer.flops), float(n)) for layer, n in zip(layers, again, strict=True)}
