"""Costs of the layers of a configuration: each kind of layer is run once per save set that means something for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from data import Batch
from engine.assemble import assemble
from engine.assembly import Assembly
from engine.config import Config, TrainConfig
from engine.config.objective_keys import few_images
from engine.recompute.ahead import Ahead
from engine.recompute.bench import Place, measure
from engine.recompute.costs import LayerCost
from engine.recompute.regions import Recompute, split_place
from engine.recompute.save_sets import SAVE_SETS, SaveSet
from model.matching import MATCH
from model.regions import Region
from parallel.config import ParallelConfig
from parallel.grid import GridShape, planned_grid

T = TypeVar("T")
META = torch.device("meta")


class LayerCosts:
    """Of all layers of a model, on a rank of its tensor and context axes.

    Neither the pipeline nor other data ranks make a difference to them, but that a schedule may split backwards and
    that weights may be gathered.
    """

    def __init__(self, assembly: Assembly, recompute: _Watched) -> None:
        self._assembly, self._recompute = assembly, recompute
        (self._stage,) = assembly.stages.values()
        self._batch = assembly.to_device(micro_batch(assembly), training=True)
        self._kinds = [self._kind_of(layer) for layer in range(len(assembly.layers))]
        self._example = {kind: layer for layer, kind in reversed(list(enumerate(self._kinds)))}
        self._regions: dict[object, frozenset[tuple[str, Region]]] = {}
        self._known: dict[object, LayerCost] = {}

    @staticmethod
    def of(config: Config, shape: GridShape, rank: int, *, on_cpu: bool = False) -> LayerCosts:
        """Those of a configuration that is resolved for a world of this shape, on one of its ranks.

        Args:
            on_cpu: whether that is a CPU, to which host memory is its own.
        """
        at = shape.coordinates(rank)
        return _costs_of(_essential(config), shape.tensor, at["tensor"], shape.context, at["context"], on_cpu)

    def kind(self, layer: int) -> object:
        """Equal for layers (by their place in the list) that hold the same."""
        return self._kinds[layer]

    def cost(self, layer: int, of: SaveSet, **where: Any) -> LayerCost:
        """Of one layer with a save set.

        Args:
            layer: place in the list. where: it stands, as in Place.
        """
        kind = self._kinds[layer]
        key = kind, self._dropped(kind, of), of.offloads, *sorted(name for name, holds in where.items() if holds)
        if key not in self._known:
            self._known[key] = self._run(self._example[kind], replace(self._place(layer), **where), of)
        return self._known[key]

    def by_set(self, layer: int, **where: Any) -> dict[str, LayerCost]:
        """As `cost`, with each save set to choose from, by its name; without those that drop more than another one, and
        save nothing by it, in the midst of a stage.
        """
        found: dict[str, LayerCost] = {}
        tried, ends = set[object](), where.get("first") or where.get("last")
        midst = self.by_set(layer, **(where | {"first": False, "last": False})) if ends else SAVE_SETS
        for name in midst:
            of = SAVE_SETS[name]
            drops = self._dropped(self._kinds[layer], of)
            if drops not in tried:
                found[name] = self.cost(layer, of, **where)
                tried.add(drops)
        return {name: found[name] for name in found if not _is_in_vain(name, found)}

    def _dropped(self, kind: object, of: SaveSet) -> frozenset[tuple[str, Region]]:
        """What of such a layer's regions go."""
        if kind not in self._regions:  # what is made once, such as weights in 8 bits, is there from now on
            layer = self._example[kind]
            self._run(layer, self._place(layer), SaveSet())
            self._regions[kind] = frozenset(self._recompute.seen)
        return frozenset(at for at in self._regions[kind] if of.dropped(*at))

    def _run(self, layer: int, place: Place, of: SaveSet) -> LayerCost:
        a, spec = self._assembly, self._assembly.layers[layer]
        module = self._stage.get_submodule(spec.name)
        self._recompute.begin({spec.name: of})

        def run(x: Tensor | None, rides: tuple[Tensor, ...]) -> Tensor:
            flow = self._stage.give(spec, module, x, rides, self._batch)
            return flow[0] if layer < len(a.layers) - 1 else a.objective.loss_share(flow, self._batch, a.grid, 1.0)

        noting = Ahead(self._recompute, a.store.use).noting
        return measure(run, place, a.store.gradients, noting, self._recompute.sent)

    def _place(self, layer: int) -> Place:
        """In the midst of a stage."""
        a, spec = self._assembly, self._assembly.layers[layer]
        ridden = any(spec.name in other.rides for other in a.layers)
        flow = tuple((of.shape, of.dtype, of.carries_gradient) for of in a.boundary(layer))
        rows, rides = spec.parted(flow)
        reads = spec.reads_rides or layer == len(a.layers) - 1  # with which the loss is counted
        carries = rows is not None and rows[2]
        # of what matches a layer: the block behind keeps what its norm is given, another match nothing of it
        shares = spec.kind == MATCH and spec.gives == "rows" and not (spec.beside or a.build.norm_from_output)
        return Place(given=rows and rows[:2], carries=carries, rides=rides, reads=reads, ridden=ridden, shares=shares)

    def _kind_of(self, layer: int) -> object:
        a, spec = self._assembly, self._assembly.layers[layer]
        made_by, args = getattr(spec.factory, "func", spec.factory), getattr(spec.factory, "args", ())
        args = tuple(bool(arg) if isinstance(arg, float) else arg for arg in args[1:])  # rates: zero or not
        prefix, precision = f"{spec.name}.", a.build.precision
        frozen = frozenset(name.removeprefix(prefix) for name in a.frozen.names if name.startswith(prefix))
        formats = precision.of_layer(spec.name), spec.name in precision.fp8
        return made_by, args, spec.stage, spec.tower, formats, frozen, self._place(layer)


class _Watched(Recompute):
    """Notes which regions of a layer give anything.

    Attributes:
        seen: (branch, region).
    """

    def __init__(self, *, of_gpu: bool) -> None:
        super().__init__({}, of_gpu=of_gpu)
        self.seen = set[tuple[str, Region]]()

    def begin(self, sets: dict[str, SaveSet]) -> None:
        """Run by these sets now."""
        self.sets, self.seen = {name: of for name, of in sets.items() if not of.keeps_all}, set()
        self.offload.sent = 0

    def sent(self) -> int:
        """Bytes that went to host memory, of which the device holds none any more."""
        self.offload.settle()
        return self.offload.sent

    def run(self, place: str, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """As Policy."""
        out = super().run(place, region, function, *inputs)
        if out is not None:
            self.seen.add((split_place(place)[1], region))
        return out


def _is_in_vain(name: str, costs: Mapping[str, LayerCost]) -> bool:
    """Whether another set drops less than this one, and nothing more is held with it."""
    return any(
        SAVE_SETS[other].drops < SAVE_SETS[name].drops and _holds_no_more(cost, costs[name])
        for other, cost in costs.items()
    )


def _holds_no_more(a: LayerCost, b: LayerCost) -> bool:
    return all(getattr(a, of.name) <= getattr(b, of.name) for of in fields(LayerCost) if of.name != "seconds")


def _essential(config: Config) -> Config:
    """What of a resolved configuration the costs go by; all else is as nobody has set it."""
    p, train, micro = config.parallel, config.train, config.train.micro_batch_size
    gathers = p.zero_stage == 3
    assert micro is not None
    return Config(
        model=config.model,
        parallel=ParallelConfig(
            tensor_parallel_size=p.tensor_parallel_size,
            context_parallel_size=p.context_parallel_size,
            sequence_parallel=p.sequence_parallel,
            zero_stage=3 if gathers else 0,
            gradient_dtype=p.gradient_dtype,
        ),
        train=TrainConfig(
            steps=1, micro_batch_size=micro, global_batch_size=few_images(micro), loss=train.loss, freeze=train.freeze,
            seed=train.seed, label_smoothing=train.label_smoothing,
        ),
        precision=config.precision,
        recompute=config.recompute.keeping_all(),
        kernels=config.kernels,
        objective=config.objective,
        text=config.text,
        contrastive=replace(config.contrastive, passes="auto"),
        distillation=replace(config.distillation, passes="auto"),
        data=config.data,  # which stored outputs of a teacher are of, with the seed
    )  # fmt: skip


@cache
def _costs_of(
    config: Config, tensor: int, tensor_index: int, context: int, context_index: int, on_cpu: bool
) -> LayerCosts:
    """On a grid of one pipeline rank, and of two data ranks where these share out the weights."""
    shape = GridShape(data=2 if config.parallel.zero_stage == 3 else 1, context=context, tensor=tensor)
    grid, recompute = planned_grid(shape, context_index * tensor + tensor_index), _Watched(of_gpu=not on_cpu)
    config = config.resolve(shape.world_size)
    return LayerCosts(assemble(config, grid, META, device_memory=0.0, regions=recompute), recompute)


def micro_batch(a: Assembly) -> Batch:
    """One that an assembly on the meta device may be run with."""
    samples, sizes, images, texts = a.config.train.micro_batch_size, a.config.model.sizes, None, None
    assert samples is not None
    size = samples * max(layer.per_sample for layer in a.layers)
    if a.holds_images:
        images = torch.empty(size, sizes.channels, *sizes.image, device=META)
    if a.holds_texts:
        length = next(layer.output[0] for layer in a.layers if layer.kind == "embed" and "texts" in layer.reads)
        texts = torch.zeros(size, length, dtype=torch.int64, device=META)
    zeros = torch.zeros(size, dtype=torch.int64, device=META)
    ones, mixes = torch.ones(size, device=META), a.config.data.mixes
    return Batch(
        images=images, texts=texts, labels=zeros, sample_ids=zeros, weights=ones,
        other_labels=zeros if mixes else None, own_shares=ones if mixes else None,
    )  # fmt: skip
