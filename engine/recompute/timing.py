"""How long layers, and the regions that they are made of, take: measured on the device, or priced by a cluster file.

A layer of each kind runs forward and backward on random rows while a policy takes the time of its regions. What a save
set costs is the sum of those that backward has run again, which a run on the meta device tells.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from engine.clusters import Cluster
from engine.clusters.pricing import Calls, Pricer, Spent
from engine.recompute.probe import Clock, Flops, Place, Prepare, Priced, ReadyLayer, RunAgain, TimedRegions, Wall
from engine.recompute.regions import Recompute
from engine.recompute.save_sets import SaveSet
from engine.recompute.save_sets import save_set as set_of
from model import Build, LayerSpec
from model.kernels import Kernels
from model.regions import Keep, Policy
from parallel.comm import Axis
from parallel.heartbeat import Whereabouts

T = TypeVar("T")
META = torch.device("meta")
_AGAIN: dict[Hashable, Mapping[Place, float]] = {}  # takes some hundredths of a second, and is the same for all layouts
_FLOPS: dict[Hashable, Mapping[Place, float]] = {}


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds of one layer for one micro-batch on one rank.

    Attributes:
        forward, backward: by what they go into (measured: all under `measured`). backward_input, backward_weight: the
            same of a split backward, in which no product of weights hides a collective.
        regions: of the forward pass. again: of each save set, the regions that backward has run again, and what share
            of each.
    """

    forward: Spent
    backward: Spent
    backward_input: Spent
    backward_weight: Spent
    regions: Mapping[Place, float]
    again: Callable[[str], Mapping[Place, float]] = lambda save_set: {}

    def backwards(self, passes: int, *, splits: bool) -> tuple[Spent, Spent]:
        """Of BACKWARD and BACKWARD_WEIGHT, or of BACKWARD_INPUT and that where a schedule `splits`.

        Args:
            passes: of the layer, as `engine.frozen` counts.
        """
        if passes < 3:
            return self.backward_input if passes == 2 else {}, {}
        return (self.backward_input, self.backward_weight) if splits else (self.backward, {})

    def seconds(self, passes: int, *, splits: bool) -> float:
        """Of forward and backward, arguments as of `backwards`."""
        return sum(sum(spent.values()) for spent in (self.forward, *self.backwards(passes, splits=splits)))

    def unhidden(self, copies: float, passes: int, *, splits: bool) -> tuple[float, float]:
        """Seconds that copies to host memory take longer than the forward, and those back than the backward.

        Args:
            copies: seconds of them, one way. Others as of `backwards`.
        """
        forward, backward = self.forward, self.backwards(passes, splits=splits)[0]
        return max(0.0, copies - sum(forward.values())), max(0.0, copies - sum(backward.values()))

    def recompute_seconds(self, save_set: str) -> float:
        """What computing again takes with this save set."""
        return sum(self.regions[place] * share for place, share in self.again(save_set).items())


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of the layers of a model, each kind once, the same code for a device and for a cluster file.

    Attributes:
        layers: of the model, in order. build: as a rank builds them. batch_size: images of a micro-batch.
        prepare: what is done to a layer, in a ModuleDict under its name, once it is there.
    """

    layers: Sequence[LayerSpec]
    build: Build
    batch_size: int
    prepare: Prepare = lambda module: None

    def measured(self, device: torch.device, runs: int = 5) -> dict[str, LayerTimes]:
        """By layer, on this device; medians over runs, after one that does not count. Collective over the tensor and
        context axes.
        """
        return self._by_layer(lambda index: self._measure(index, device, runs))

    def priced(self, cluster: Cluster, where: Whereabouts) -> dict[str, LayerTimes]:
        """By layer, on a cluster.

        Args:
            where: of the planned grid that `build` is for.
        """
        return self._by_layer(lambda index: self._priced(index, cluster, where))

    def weights(self) -> dict[str, tuple[int, int]]:
        """By layer: numbers in its weights on a rank, and their bytes."""

        def of(index: int) -> tuple[int, int]:
            parameters = list(self._planned._layer(index, Keep(), META).module.parameters())
            return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

        return self._by_layer(of)

    def calls(self, index: int) -> int:
        """How many operators that take time forward and backward of a layer call."""
        layer = self._planned._layer(index, Keep(), META)
        with Calls() as calls:
            layer.step()
        return calls.count

    def _by_layer(self, find: Callable[[int], T]) -> dict[str, T]:
        known, found = dict[Hashable, T](), dict[str, T]()
        for index, spec in enumerate(self.layers):
            kind = kind_of(spec, self.build)
            if kind not in known:
                known[kind] = find(index)
            found[spec.name] = known[kind]
        return found

    def _measure(self, index: int, device: torch.device, runs: int) -> LayerTimes:
        clock = Wall(device)
        policy = TimedRegions(clock)
        layer = self._layer(index, policy, device)
        found = [self._once(layer, policy, clock) for _ in range(runs + 1)][1:]

        def median(name: str) -> dict[Any, float]:
            return {key: statistics.median(getattr(t, name)[key] for t in found) for key in getattr(found[0], name)}

        return LayerTimes(
            forward=median("forward"),
            backward=median("backward"),
            backward_input=median("backward_input"),
            backward_weight=median("backward_weight"),
            regions=median("regions"),
            again=self._again(index),
        )

    def _priced(self, index: int, cluster: Cluster, where: Whereabouts) -> LayerTimes:
        with Pricer(cluster) as pricer, pricer.listening(where):
            clock = Priced(pricer)
            policy = TimedRegions(clock)
            times = self._once(self._planned._layer(index, policy, META), policy, clock)
        return replace(times, again=self._again(index))

    def _once(self, layer: ReadyLayer, policy: TimedRegions, clock: Clock) -> LayerTimes:
        layer.sink.defers = False
        forward, backward = layer.step(clock)
        regions = policy.take()
        layer.sink.defers = True
        _, backward_input = layer.step(clock)
        policy.take()
        layer.sink.run()
        return LayerTimes(
            forward=forward,
            backward=backward,
            backward_input=backward_input,
            backward_weight=clock.spent(),
            regions=regions,
        )

    def _again(self, index: int) -> Callable[[str], Mapping[Place, float]]:
        """Which regions a save set runs again: the same for any number of images and ranks."""
        small, key = self._small, self._key(index)

        def again(save_set: str) -> Mapping[Place, float]:
            save_set = save_set.removesuffix("+offload")
            if (*key, save_set) not in _AGAIN:
                _AGAIN[*key, save_set] = small.run_again(index, set_of(save_set), META)
            return _AGAIN[*key, save_set]

        return again

    def flops_again(self, index: int, of: SaveSet) -> int:
        """FLOPs per image, of products, that backward computes again with a save set."""
        key = self._key(index)
        if key not in _FLOPS:
            with Flops() as clock:
                policy = TimedRegions(clock)
                self._small._layer(index, policy, META).step()
            _FLOPS[key] = policy.take()
        return round(sum(_FLOPS[key][place] * share for place, share in self._again(index)(of.name).items()))

    @cached_property
    def _small(self) -> Timing:
        """The same without ranks, for one image."""
        return replace(self._planned, batch_size=1)

    def _key(self, index: int) -> tuple[Hashable, ...]:
        """What layers have in common whose regions are alike."""
        build = self._small.build
        return build.config, kind_of(self.layers[index], build), build.tp.splits_rows, build.kernels.backend

    def run_again(self, index: int, of: SaveSet, device: torch.device) -> dict[Place, float]:
        """Which regions of a layer run again with a save set, and what share of each, by running it."""
        policy = RunAgain(_policy(self.layers[index].name, of))
        self._layer(index, policy, device).step()
        return policy.again

    @cached_property
    def _planned(self) -> Timing:
        """The same without ranks."""
        tp = self.build.tp
        own = self.build.kernels.backend
        return replace(
            self,
            build=replace(
                self.build,
                tp=replace(tp, axis=_planned(tp.axis)),
                context=_planned(self.build.context),
                kernels=Kernels("reference" if own == "reference" else "native"),
            ),
        )

    def _layer(self, index: int, policy: Policy, device: torch.device) -> ReadyLayer:
        build = replace(self.build, policy=policy)
        return ReadyLayer(self.layers, index, build, self.batch_size, self.prepare, device)


def kind_of(spec: LayerSpec, build: Build) -> Hashable:
    """What layers have in common that take the same time."""
    args: Sequence[Any] = getattr(spec.factory, "args", ())
    rate, rest = args[1:2], args[2:]  # after the name: drop-path, kind of attention
    formats = build.precision.of_layer(spec.name), spec.name in build.precision.fp8
    return getattr(spec.factory, "func", spec.factory), any(rate), rest, spec.stage, spec.tower, formats


def _policy(name: str, of: SaveSet) -> Policy:
    return Keep() if not of.drops else Recompute({name: of})


def _planned(axis: Axis) -> Axis:
    return replace(axis, group=None, channel=None, planned=True)
