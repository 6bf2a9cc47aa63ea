"""A training step as it is predicted before anything has run: the simulator's, with costs by FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

from model import LayerSpec
from parallel.pipeline import Costs, Placement, Schedule, Timeline, simulate
from parallel.pipeline.readiness import Policy


def predicted_step(
    schedule: Schedule,
    placement: Placement,
    layers: Sequence[LayerSpec],
    passes: Sequence[int],
    policy: Policy = "static",
    again: Sequence[int] = (),
) -> Timeline:
    """The simulated step.

    Args:
        layers, passes, again: as for `predicted_costs`.
    """
    return simulate(schedule, predicted_costs(placement, layers, passes, again), policy)


def predicted_costs(
    placement: Placement, layers: Sequence[LayerSpec], passes: Sequence[int], again: Sequence[int] = ()
) -> Costs:
    """Time is counted in FLOPs per image; messages take none.

    Args:
        layers: of the whole model. passes: of each layer, products of the forward's cost (engine.frozen): forward,
            gradient of the inputs, gradient of the weights. again: of each, FLOPs that are computed again, if any are.
    """

    def of(least: int) -> tuple[float, ...]:
        return tuple(
            float(sum(layers[i].flops for i in stage if passes[i] >= least)) for stage in placement.layers
        )  # fmt: skip

    recompute = tuple(float(sum(again[i] for i in stage)) if again else 0.0 for stage in placement.layers)
    return Costs(forward=of(1), backward_input=of(2), backward_weight=of(3), recompute=recompute)
