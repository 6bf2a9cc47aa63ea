"""A model is an ordered list of named layers; the pipeline cuts this list.

Shapes between layers and the cost of each layer are worked out by running it on the meta device, so nothing here
repeats what a layer computes. Legend: B images, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from model.beside import POOLED, Beside
from model.blocks import BLOCKS
from model.build import Build, Tower
from model.config import ModelConfig
from model.embed import Embedding
from model.flops import ProductFlops
from model.heads import Head
from model.inputs import MicroBatch
from model.merge import PatchMerge, Widening
from parallel.layout import TensorLayout, info_of

Factory = Callable[[Build], nn.Module]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer of the list.

    What a layer is given is a tuple: the output of the layer before it, then its *rides*, outputs of earlier layers
    that a later one waits for, and which the layers in between hand on untouched. Where the layers of several models
    take turns, its rows are one of the rides, and the output of the layer before is a ride instead.

    Attributes:
        name: global, e.g. `blocks.17`; the prefix of its parameters' names in every layout.
        factory: makes the module, its parameters on the meta device.
        flops: of the forward matrix products per sample, 2 per multiply-add.
        parameters: of the logical layer.
        stage: of the pyramid, whose tokens it gives out.
        output: rows per sample (on all context ranks together) and width of what it gives to the next layer.
        tower: that it belongs to; None in a model of one.
        gives: rows of tokens; one vector per image or text, whole on every tensor rank (`vectors`); or this tensor
            rank's share of its features (`shares`).
        beside: what it gives beside that, in one tensor with it (model.beside): `q`, `k`, `v` of a block, `pooled` of a
            head. columns: of its input that are its rows, where the layer before it gives others beside them.
        reads: of the micro-batch. per_sample: images per sample, 2 or more where each has several views.
        rides: the layers whose outputs ride beside its input, by name, in order.
        begins: whether it begins a later tower: the output of the layer before it is a ride, too, and it is given no
            rows. takes: which of what it is given are its rows. sees: which of its rides it reads, too, which rides on;
            None: none. joins: whether it reads all of them, as the last, and gives out a tuple.
    """

    name: str
    factory: Factory
    flops: int = 0
    parameters: int = 0
    stage: int = 0
    output: tuple[int, int] = (0, 0)
    tower: Tower | None = None
    gives: Literal["rows", "vectors", "shares"] = "rows"
    beside: str = ""
    columns: int | None = None
    reads: tuple[Literal["images", "texts", "outputs"], ...] = ()
    per_sample: int = 1
    rides: tuple[str, ...] = ()
    begins: bool = False
    takes: int = 0
    sees: int | None = None
    joins: bool = False

    @property
    def reads_rides(self) -> bool:
        """Whether it is given what rides past it."""
        return self.sees is not None or self.joins

    @property
    def is_frozen(self) -> bool:
        """Whether it is of a tower of which nothing is trained."""
        return self.tower is not None and self.tower.frozen

    @property
    def kind(self) -> str:
        """What of a tower it is: `embed`, `blocks`, `merges`, `head`; or `pair`, `match`."""
        *path, last = self.name.split(".")
        return path[-1] if last.isdigit() else last

    def boundary(self, batch_size: int, build: Build) -> tuple[int, int]:
        """Shape of its output for so many samples on this rank (of any layer but the last of all)."""
        here, images = build.of(self), batch_size * self.per_sample
        if self.gives == "rows":
            width = Beside.of(here, self.beside).columns if self.beside else self.output[1]
            return here.tp.local_rows(images * here.tokens.count), width
        if self.beside == POOLED:
            return images, here.part(here.sizes.classes) + self.output[1] - here.sizes.classes
        return images, here.part(self.output[1]) if self.gives == "shares" else self.output[1]

    def parted(self, flow: tuple[T, ...]) -> tuple[T | None, tuple[T, ...]]:
        """What it is given: its rows (None for the first layer of a tower), and its rides."""
        if self.begins or not flow:
            return None, flow
        return flow[self.takes], (*flow[: self.takes], *flow[self.takes + 1 :])

    def seen(self, rides: tuple[T, ...]) -> tuple[T, ...]:
        """Those of its rides that it reads."""
        if self.joins:
            return rides
        return () if self.sees is None else (rides[self.sees],)

    def arguments(self, x: Tensor | None, batch: MicroBatch, rides: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """What its forward is called with."""
        if x is not None and self.columns is not None:
            x = x[:, : self.columns].contiguous()
        return (x, batch, self.seen(rides)) if self.reads_rides else (x, batch)


def makers(layers: Sequence[LayerSpec], place: int) -> tuple[LayerSpec, ...]:
    """The layers whose outputs a layer, by its place, is given, in order: what the one before it hands on."""
    if not place:
        return ()
    named, before = {layer.name: layer for layer in layers}, layers[place - 1]
    return (before, *(named[name] for name in before.rides * (not before.joins)))


def ride_of(layers: Sequence[LayerSpec], place: int) -> range | None:
    """What of the list a ride spans that is made by a layer, else passes it or is read by it: from its maker to its
    reader, by place; to the end, if that is the loss.
    """
    spec, behind = layers[place], layers[place + 1 : place + 2]
    name = spec.name if any(spec.name in layer.rides for layer in behind) else next(iter(spec.rides), None)
    if name is None:
        return None
    maker = next(n for n, layer in enumerate(layers) if layer.name == name)
    readers = (n for n in range(maker + 1, len(layers)) if layers[n].joins or name not in layers[n].rides)
    return range(maker, next(readers, len(layers) - 1) + 1)


def build_layers(config: ModelConfig) -> list[LayerSpec]:
    """The layers of a resolved configuration, in order: `embed`, `blocks.0` ..., `merges.0` between stages, `head`."""
    return list(_measured(config))


@cache
def _measured(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """A tenth of a second, and the same for every run of a configuration in this process."""
    sizes = config.sizes
    batch = MicroBatch.of_images(torch.empty(1, sizes.channels, *sizes.image, device="meta"))
    return tuple(measured(_layers(config), Build(config=config), batch))


def logical_shapes(config: ModelConfig, layers: Sequence[LayerSpec] | None = None) -> dict[str, tuple[int, ...]]:
    """Of all parameters of a model, in order, by their names; nothing is allocated.

    Args:
        config: resolved. layers: if they are others than the configuration's own.
    """
    return {name: layout.shape for name, layout in logical_layouts(config, layers).items()}


def logical_layouts(config: ModelConfig, layers: Sequence[LayerSpec] | None = None) -> dict[str, TensorLayout]:
    """The same with how each is split."""
    build, layouts = Build(config=config), dict[str, TensorLayout]()
    for spec in layers or _layers(config):
        layer = spec.factory(build.of(spec))
        layouts |= {f"{spec.name}.{name}": info_of(p).layout for name, p in layer.named_parameters()}
    return layouts


def _layers(config: ModelConfig) -> list[LayerSpec]:
    return [
        LayerSpec(name="embed", factory=Embedding, reads=("images",)),
        *block_layers(config),
        LayerSpec(name="head", factory=Head, stage=config.sizes.last.index, gives=head_gives(config)),
    ]


def head_gives(config: ModelConfig) -> Literal["vectors", "shares"]:
    """Without a classifier whole vectors, else a tensor rank's share of its classes."""
    return "shares" if config.sizes.classes else "vectors"


def block_layers(config: ModelConfig, prefix: str = "") -> list[LayerSpec]:
    """Blocks and patch merges of a resolved configuration, neither measured nor told of their tower."""
    sizes, block = config.sizes, BLOCKS[config.block or "sequential"]
    layers: list[LayerSpec] = []
    done = 0
    for stage in sizes.stages:
        if stage.index:
            merge = f"{prefix}merges.{stage.index - 1}"
            between = PatchMerge if stage.merges else Widening
            layers.append(LayerSpec(name=merge, factory=partial(between, merge), stage=stage.index))
        for i, kind in enumerate(stage.kinds, start=done):
            rate, name = config.drop_path * i / max(1, sizes.depth - 1), f"{prefix}blocks.{i}"
            layers.append(LayerSpec(name=name, factory=partial(block, name, rate, kind), stage=stage.index))
        done += stage.depth
    return layers


def measured(layers: Sequence[LayerSpec], build: Build, batch: MicroBatch) -> list[LayerSpec]:
    """Costs and shapes filled in by one sample's forward on the meta device, once per class, kind and stage of layers.

    Args:
        build: on one rank. batch: one sample on the meta device.
    """
    known: dict[object, tuple[int, int, tuple[Tensor, ...]]] = {}
    batch = replace(batch, training=True)  # what is left out of evaluation costs, too
    flow: tuple[Tensor, ...] = ()
    out = []
    for spec in layers:
        made_by, args = getattr(spec.factory, "func", spec.factory), getattr(spec.factory, "args", ())[1:]
        args = tuple(arg for arg in args if not isinstance(arg, float))  # rates of drop-path cost nothing
        kind = (made_by, args, spec.stage, spec.tower)
        x, rides = spec.parted(flow)
        if kind not in known:
            given = spec.arguments(torch.empty(0, device="meta") if x is None else x, batch, rides)
            with torch.inference_mode(False), ProductFlops() as counter, torch.no_grad():
                layer = spec.factory(build.of(spec))
                y = layer(*given)
            outputs = y if isinstance(y, tuple) else (y,)
            known[kind] = (counter.flops, sum(p.numel() for p in layer.parameters()), outputs)
        flops, parameters, outputs = known[kind]
        flow = outputs if spec.joins else (*outputs, *rides)
        output = (outputs[0].shape[0], outputs[0].shape[1])
        out.append(replace(spec, flops=flops, parameters=parameters, output=output))
    return out


def training_flops(layers: Sequence[LayerSpec]) -> int:
    """FLOPs per sample of forward and backward, matrix products alone: what MFU counts (Chowdhery et al. 2022)."""
    return 3 * sum(layer.flops for layer in layers)
