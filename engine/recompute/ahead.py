"""What is dropped is computed again ahead of its backward, while a pipeline's rank waits: the R of its schedule."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.prediction import predicted_costs
from engine.recompute.regions import Recompute
from engine.recompute.save_sets import SaveSet
from model import Build, LayerSpec, MicroBatch, ModelConfig
from model.regions import Keep
from parallel.pipeline import Placement, Schedule, simulate, with_recompute
from parallel.pipeline.readiness import Policy

_ROUNDED = 1e-9
_LEAST = 1 / 50  # of a forward: what is computed again without a product is bound by memory
_AGAIN: dict[Hashable, int] = {}  # takes some hundredths of a second per kind of layer


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
    costs = predicted_costs(placement, layers, passes, again)
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
    found = []
    for before, spec in zip([None, *layers], layers, strict=False):
        of = sets.get(spec.name, SaveSet())
        found.append(_again(before, spec, of, config) if of.drops else 0)
    return tuple(found)


def _again(before: LayerSpec | None, spec: LayerSpec, of: SaveSet, config: ModelConfig) -> int:
    kind = getattr(spec.factory, "func", spec.factory), getattr(spec.factory, "args", ())[2:], spec.stage
    key = config, kind, of
    if key not in _AGAIN:
        with_set, without = (_flops(before, spec, chosen, config) for chosen in (of, SaveSet()))
        _AGAIN[key] = max(with_set - without, int(spec.flops * _LEAST), 1)
    return _AGAIN[key]


def _flops(before: LayerSpec | None, spec: LayerSpec, of: SaveSet, config: ModelConfig) -> int:
    """Of forward and backward, by running them on the meta device."""
    policy = Recompute({spec.name: of}) if of.drops else Keep()
    layer = spec.factory(Build(config=config, stage=spec.stage, policy=policy))
    batch = MicroBatch.of_images(torch.empty(1, config.sizes.channels, *config.sizes.image, device="meta"))
    x = None if before is None else torch.empty(before.output, device="meta", requires_grad=True)
    with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        layer(x, batch).sum().backward()
    return counter.get_total_flops()
