"""What the engine asks of the list of layers: whose a parameter is, how deep a layer is, what flows between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from model import MATCH, TEACHER, TOWERS, Build, LayerSpec
from parallel.pipeline.boundary import TensorSpec


def layer_of(name: str) -> str:
    """The layer of a parameter: `blocks.3` of `blocks.3.attn.qkv.weight`, `text.head` of `text.head.fc.bias`,
    `teacher.0.blocks.3` of one of several teachers, `teacher.image.blocks.3` of one with towers."""
    parts = name.split(".")
    start = int(parts[0] in (*TOWERS, TEACHER))
    start += parts[0] == TEACHER and (parts[1].isdigit() or parts[1] in TOWERS)
    return ".".join(parts[: start + (2 if parts[start + 1 :] and parts[start + 1].isdigit() else 1)])


def depths_of(layers: Sequence[LayerSpec]) -> dict[str, int]:
    """By the layers' names: places in the list, if each tower stood at its end alone (optimizer.layer_decay).

    What matches a layer with a teacher's is as deep as that layer, and makes none deeper.
    """
    depths, left = dict[str, int](), Counter(layer.tower for layer in layers if layer.kind != MATCH)
    for layer in layers:
        left[layer.tower] -= layer.kind != MATCH
        depths[layer.name] = len(layers) - 1 - left[layer.tower]
    return depths


def outputs_of(
    layers: Sequence[LayerSpec], passes: Sequence[int], batch_size: int, build: Build
) -> dict[str, TensorSpec]:
    """What each layer but the last gives out of a micro-batch, by its name.

    Args:
        passes: of each, as `engine.frozen` counts.
    """
    return {
        layer.name: TensorSpec(layer.boundary(batch_size, build), build.precision.of_layer(layer.name), count > 1)
        for layer, count in zip(layers[:-1], passes, strict=False)
    }
