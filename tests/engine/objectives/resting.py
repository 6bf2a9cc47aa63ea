"""Layers that evaluations are not to run."""

from __future__ import annotations

from typing import Any

from engine.run.step import Stepper


def resting(stepper: Stepper) -> bool:
    """Whether there are layers that rest in evaluation: from now on they fail if they are run there."""

    def trains(_: object, args: tuple[Any, ...]) -> None:
        assert args[1].training

    layers = [of for stage in stepper.assembly.stages.values() for of in zip(stage.specs, stage.layers, strict=True)]
    rest = [layer for spec, (_, layer) in layers if spec.tower is not None and spec.tower.rests]
    for layer in rest:
        layer.register_forward_pre_hook(trains)
    return bool(rest)
