"""What is dropped is computed again ahead of its backward, while a pipeline's rank waits: the R of its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from engine.prediction import flop_times, predicted_costs
from engine.recompute.regions import Recompute
from engine.recompute.save_sets import SaveSet
from engine.recompute.timing import Timing
from model import Build, LayerSpec, ModelConfig
from model.kernels import Kernels
from parallel.pipeline import Placement, Schedule, simulate, with_recompute
from parallel.pipeline.readiness import Policy

_ROUNDED = 1e-9
_LEAST = 1 / 50  # of a forward: what is computed again without a product is bound by memory


class Ahead:
    """Notes what the forward of a stage and micro-batch drops, and runs it again (parallel.pipeline's Recomputer).

    Nothing is kept for that: what backward no longer wants is not run.

    Args:
        policy: runs the regions. use: has the weights of a layer in place (ParameterStore.use).
    """

    def __init__(self, policy: Recompute, use: Callable[[str], None]) -> None:
        self._policy, self._use = policy, use

    @contextmanager
    def noting(self) -> Iterator[list[Callable[[], None]]]:
        """As Recomputer."""
        again = list[Callable[[], None]]()
        with self._policy.noting() as calls:
            yield again
        again += [partial(call.again, self._use) for call in calls]


def recompute_schedule(
    schedule: Schedule,
    placement: Placement,
    layers: Sequence[LayerSpec],
    passes: Sequence[int],
    again: Sequence[int],
    policy: Policy,
) -> Schedule:
    """The schedule with an R wherever a rank would wait, unless it has some already.

    By readiness, actions that come in another order may take longer than they are shorter: then there are none.

    Args:
        layers: of the whole model. passes: of each, as `engine.frozen` counts. again: what `flops_again` found.
        policy: by which ranks go through the schedule.
    """
    if schedule.recomputes:
        return schedule
    costs = predicted_costs(schedule, placement, layers, passes, flop_times(layers, again), {})
    filled = with_recompute(schedule, costs)
    if policy == "static" or not filled.recomputes:
        return filled
    before, after = (simulate(one, costs, policy).makespan for one in (schedule, filled))
    return filled if after <= before * (1 + _ROUNDED) else schedule


def flops_again(layers: Sequence[LayerSpec], sets: Mapping[str, SaveSet], config: ModelConfig) -> tuple[int, ...]:
    """Of each layer, FLOPs per image that its save set has backward compute again; more than 0 if it drops anything.

    Args:
        config: resolved.
    """
    build = Build(config=config, kernels=Kernels("reference"))  # whose products are counted
    timing = Timing(layers=layers, build=build, batch_size=1)
    dropping = {place: sets[layer.name] for place, layer in enumerate(layers) if layer.name in sets}
    return tuple(
        max(timing.flops_again(place, of), int(layer.flops * _LEAST), 1)
        if (of := dropping.get(place, SaveSet())).drops
        else 0
        for place, layer in enumerate(layers)
    )
