"""A model is an ordered list of named layers; the pipeline cuts this list.

Shapes between layers and the cost of each layer are worked out by running it on the meta device, so nothing here
repeats what a layer computes. Legend: B images, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.blocks import BLOCKS
from model.build import Build
from model.config import ModelConfig
from model.embed import Embedding
from model.heads import Head
from model.inputs import MicroBatch
from model.merge import PatchMerge
from parallel.layout import info_of

Factory = Callable[[Build], nn.Module]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer of the list.

    Attributes:
        name: global, e.g. `blocks.17`; the prefix of its parameters' names in every layout.
        factory: makes the module, its parameters on the meta device.
        flops: of the forward matrix products per image, 2 per multiply-add.
        parameters: of the logical layer.
        stage: of the pyramid, whose tokens it gives out.
        output: rows per image (on all context ranks together) and width of what it gives to the next layer.
    """

    name: str
    factory: Factory
    flops: int = 0
    parameters: int = 0
    stage: int = 0
    output: tuple[int, int] = (0, 0)

    def boundary(self, batch_size: int, build: Build) -> tuple[int, int]:
        """Shape of its output for B images on this rank (of any layer but the head)."""
        return build.tp.local_rows(batch_size * build.at(self.stage).tokens.count), self.output[1]


def build_layers(config: ModelConfig) -> list[LayerSpec]:
    """The layers of a resolved configuration, in order: `embed`, `blocks.0` ..., `merges.0` between stages, `head`."""
    return list(_measured(config))


@cache
def _measured(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """A tenth of a second, and the same for every run of a configuration in this process."""
    return tuple(_measure(_layers(config), config))


def logical_shapes(config: ModelConfig, layers: Sequence[LayerSpec] | None = None) -> dict[str, tuple[int, ...]]:
    """Of all parameters of a model, in order, by their names; nothing is allocated.

    Args:
        config: resolved. layers: if they are others than the configuration's own.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in layers or _layers(config):
        layer = spec.factory(Build(config=config, stage=spec.stage))
        shapes |= {f"{spec.name}.{name}": info_of(p).layout.shape for name, p in layer.named_parameters()}
    return shapes


def _layers(config: ModelConfig) -> list[LayerSpec]:
    sizes, block = config.sizes, BLOCKS[config.block or "sequential"]
    layers = [LayerSpec(name="embed", factory=Embedding)]
    done = 0
    for stage in sizes.stages:
        if stage.index:
            merge = f"merges.{stage.index - 1}"
            layers.append(LayerSpec(name=merge, factory=partial(PatchMerge, merge), stage=stage.index))
        for i, kind in enumerate(stage.kinds, start=done):
            rate = config.drop_path * i / max(1, sizes.depth - 1)
            factory = partial(block, f"blocks.{i}", rate, kind)
            layers.append(LayerSpec(name=f"blocks.{i}", factory=factory, stage=stage.index))
        done += stage.depth
    layers.append(LayerSpec(name="head", factory=Head, stage=sizes.last.index))
    return layers


def _measure(layers: Sequence[LayerSpec], config: ModelConfig) -> list[LayerSpec]:
    """Fill in costs and shapes by one image's forward on the meta device, once per class, kind and stage of layers."""
    sizes = config.sizes
    batch = MicroBatch.of_images(torch.empty(1, sizes.channels, *sizes.image, device="meta"))
    known: dict[object, tuple[int, int, Tensor]] = {}
    x = torch.empty(0, device="meta")
    out = []
    for spec in layers:
        kind = (getattr(spec.factory, "func", spec.factory), getattr(spec.factory, "args", ())[2:], spec.stage)
        if kind not in known:
            with torch.inference_mode(False), FlopCounterMode(display=False) as counter, torch.no_grad():
                layer = spec.factory(Build(config=config, stage=spec.stage))
                y = layer(x, batch)
            known[kind] = (counter.get_total_flops(), sum(p.numel() for p in layer.parameters()), y)
        flops, parameters, x = known[kind]
        out.append(replace(spec, flops=flops, parameters=parameters, output=(x.shape[0], x.shape[1])))
    return out


def training_flops(layers: Sequence[LayerSpec]) -> int:
    """FLOPs per image of forward and backward, matrix products alone: what MFU counts (Chowdhery et al. 2022)."""
    return 3 * sum(layer.flops for layer in layers)
