"""Named logical parameters dealt to data x tensor ranks as flat arrays that are cut anywhere, and training on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.optimizers import Optimizer, make_optimizer
from model.kernels import Kernels
from parallel.comm import single_axis
from parallel.grid import GridShape, make_grid
from parallel.layout import Init, ParameterInfo, TensorLayout
from parallel.process_group import World
from parallel.sharding.fragments import Fragment, Fragments, Group, Holding, Span


class Spec(NamedTuple):
    """A logical parameter. segments, dim, unit: how it is split over tensor ranks; partial: a copy on each, cut into
    shards over them too.
    """

    name: str
    shape: tuple[int, ...]
    decay: str
    dim: int | None = None
    segments: tuple[int, ...] = ()
    unit: int = 1
    partial: bool = False
    depth: int = 1


# Sides on both sides of Adafactor's 32; tall and wide; a fused one whose heads of 12 do not divide over 2 ranks evenly.
SPECS = [
    Spec("embed", (36, 75), "body", depth=0),
    Spec("pos", (5, 36), "none", depth=0, partial=True),
    Spec("in_proj", (36 + 36 + 36 + 61, 36), "body", 0, (36, 36, 36, 61), 12),
    Spec("in_bias", (169,), "none", 0, (36, 36, 36, 61), 12),
    Spec("out_proj", (36, 36 + 61), "body", 1, (36, 61), 12),
    Spec("norm", (36,), "none", partial=True),
    Spec("mix", (33, 40), "body", partial=True),
    Spec("small", (7, 20), "body"),
    Spec("scale", (), "none"),
    Spec("head", (34, 36), "head", 0, (34,), depth=2),
]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the parameters are dealt out."""

    data: int = 1
    tensor: int = 1
    stage: int = 0

    @property
    def ranks(self) -> int:
        return self.data * self.tensor


def info_of(spec: Spec, layout: Layout, tensor_index: int) -> ParameterInfo:
    units = tuple(spec.unit if segment % spec.unit == 0 else 1 for segment in spec.segments)
    split = TensorLayout(
        shape=spec.shape, dim=spec.dim, segments=spec.segments, units=units, parts=layout.tensor, index=tensor_index
    ) if spec.dim is not None else TensorLayout(shape=spec.shape)  # fmt: skip
    return ParameterInfo(layout=split, init=Init(kind="normal", scales=(1.0,)), decay=spec.decay)


class Place(NamedTuple):
    """Where a parameter lies in a rank's flat arrays. bucket: which; offset: in it. trained, own: elements [a, b)."""

    spec: Spec
    info: ParameterInfo
    bucket: tuple[Any, ...]
    offset: int
    numel: int
    trained: tuple[int, int]
    own: tuple[int, int]


def places(specs: Sequence[Spec], layout: Layout, rank: int) -> list[Place]:
    """All parameters, bucket by bucket; each bucket is cut into uneven shards in the middle of rows."""
    data, tensor = divmod(rank, layout.tensor)
    filled: dict[tuple[Any, ...], list[tuple[Spec, ParameterInfo, int, int]]] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for spec in specs:
        info = info_of(spec, layout, tensor)
        partial = spec.partial and layout.tensor > 1
        bucket = (spec.decay, spec.depth, info.layout.is_sharded, partial)
        numel = torch.Size(info.layout.local_shape).numel()
        filled.setdefault(bucket, []).append((spec, info, sizes.get(bucket, 0), numel))
        sizes[bucket] = sizes.get(bucket, 0) + numel
    found = []
    for bucket, members in filled.items():
        parts, index = (layout.ranks, rank) if bucket[-1] else (layout.data, data)
        # shards of about 1 : 2 : 3 : ..., so that small parameters are missing on some ranks
        cuts = [sizes[bucket] * i * (i + 1) // (parts * (parts + 1)) for i in range(parts + 1)]
        whole, shard = (0, sizes[bucket]), (cuts[index], cuts[index + 1])
        counts = bucket[2] or bucket[3] or tensor == 0
        for spec, info, offset, numel in members:
            trained = _within(whole if layout.stage == 0 else shard, offset, numel)
            own = _within(shard, offset, numel) if counts else (0, 0)
            found.append(Place(spec, info, bucket, offset, numel, trained, own))
    order = [spec.name for spec in specs]
    return sorted(found, key=lambda place: order.index(place.spec.name))


def _within(part: tuple[int, int], offset: int, numel: int) -> tuple[int, int]:
    start, stop = max(part[0] - offset, 0), min(part[1] - offset, numel)
    return (start, stop) if start < stop else (0, 0)


def logical(specs: Sequence[Spec], seed: int) -> dict[str, Tensor]:
    """A value for every logical parameter, fp32; rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randn(spec.shape, generator=generator)
        * torch.rand(spec.shape[:1] + (1,) * (len(spec.shape) - 1), generator=generator).add(0.1)
        for spec in specs
    }  # fmt: skip


def holdings(specs: Sequence[Spec], layout: Layout, field: str) -> dict[str, list[Holding]]:
    found: dict[str, list[Holding]] = {spec.name: [] for spec in specs}
    for rank in range(layout.ranks):
        for place in places(specs, layout, rank):
            start, stop = getattr(place, field)
            found[place.spec.name].append(Holding(rank, place.info.layout, start, stop))
    return found


def make_fragments(
    specs: Sequence[Spec], layout: Layout, rank: int, axis: Any, device: str = "cpu", mixed: bool = False
) -> Fragments:
    """This rank's fragments of the parameters logical(specs, seed=0), on shared flat arrays. mixed: with bf16 weights
    for the model.
    """
    values = logical(specs, 0)
    here = places(specs, layout, rank)
    spans, fragments = {}, {}
    for bucket in dict.fromkeys(place.bucket for place in here):
        members = [place for place in here if place.bucket == bucket]
        parts = [_cut(values[p.spec.name], p.info.layout, *p.trained) for p in members]
        weight = torch.cat(parts).to(device)
        model = weight.bfloat16() if mixed else None
        group, grad = Group(*bucket[:2]), torch.zeros_like(weight)
        spans[bucket] = Span(group, (), weight, grad, model)
        offset = 0
        for place in members:
            (start, stop), (first, last) = place.trained, place.own
            here_flat = slice(offset, offset + stop - start)
            own = slice(first - start, last - start) if first < last else slice(0, 0)
            fragments[place.spec.name] = Fragment(
                place.spec.name, place.info, group, start, stop, own, weight[here_flat], grad[here_flat],
                None if model is None else model[here_flat],
            )  # fmt: skip
            offset += stop - start
    return Fragments(
        spans=list(spans.values()),
        fragments=[fragments[spec.name] for spec in specs],
        axis=axis,
        owned=holdings(specs, layout, "own"),
        trained=holdings(specs, layout, "trained"),
    )


def _cut(value: Tensor, layout: TensorLayout, start: int, stop: int) -> Tensor:
    return layout.local(value).flatten()[start:stop].clone()


def set_gradients(fragments: Fragments, specs: Sequence[Spec], step: int) -> None:
    """Those of logical(specs, seed=step)."""
    values = logical(specs, step)
    for f in fragments.fragments:
        f.grad.copy_(_cut(values[f.name], f.info.layout, f.start, f.stop))


CONFIG = SimpleNamespace(
    name="adamw", betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05, head_weight_decay=0.4, momentum=0.9, layer_decay=0.8
)
DEPTH = 2
RATES = [0.02, 0.01, 0.03, 0.015, 0.01]  # of each step
GRAD_FACTOR = 0.7
DECAY_FACTORS = [1.0, 0.5, 0.8, 0.3, 0.2]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A short training."""

    name: str
    layout: Layout = Layout()
    decay_by_schedule: bool = False
    kernels: str = "auto"
    mixed: bool = False


def train(optimizer: Optimizer, specs: Sequence[Spec], by_schedule: bool) -> None:
    for step, (lr, decay) in enumerate(zip(RATES, DECAY_FACTORS, strict=True), 1):
        set_gradients(optimizer.fragments, specs, step)
        optimizer.update(lr=lr, grad_factor=GRAD_FACTOR, decay_factor=decay if by_schedule else None)


def build(run: Run, rank: int = 0, axis: Any = None, device: str = "cpu") -> Optimizer:
    fragments = make_fragments(SPECS, run.layout, rank, axis or single_axis("all"), device, run.mixed)
    config: Any = SimpleNamespace(**{**vars(CONFIG), "name": run.name})
    return make_optimizer(config, fragments, Kernels(run.kernels), DEPTH)  # type: ignore[arg-type]


Trained = dict[str, tuple[int, int, Tensor, Tensor | None]]  # start, stop, weight, the model's


def run_here(run: Run, rank: int = 0, axis: Any = None) -> Trained:
    """One rank's trained fragments."""
    optimizer = build(run, rank, axis)
    train(optimizer, SPECS, run.decay_by_schedule)
    return {f.name: (f.start, f.stop, f.weight, f.model_weight) for f in optimizer.fragments.fragments}


def on_rank(world: World, runs: Sequence[Run]) -> list[Trained]:
    shapes = {GridShape(data=run.layout.data, tensor=run.layout.tensor): None for run in runs}
    axes = {shape: make_grid(shape, world).along("data", "context", "tensor") for shape in shapes}
    return [run_here(run, world.rank, axes[GridShape(data=run.layout.data, tensor=run.layout.tensor)]) for run in runs]


def whole(run: Run, trained: Sequence[Trained]) -> dict[str, Tensor]:
    """The logical parameters put together from all ranks; what several ranks train must be the same bits."""
    found = {}
    for spec in SPECS:
        full = torch.full(spec.shape, float("nan"))
        for rank, of_rank in enumerate(trained):
            layout = info_of(spec, run.layout, rank % run.layout.tensor).layout
            local, (start, stop, part, _) = layout.local(full).flatten(), of_rank[spec.name]
            known = local[start:stop]
            assert bool(((known == part) | known.isnan()).all()), (spec.name, rank)
            local[start:stop] = part
            layout.place(full, local.view(layout.local_shape))
        assert not full.isnan().any(), spec.name
        found[spec.name] = full
    return found


@cache
def single(run: Run) -> dict[str, Tensor]:
    """The parameters after training in this process."""
    torch.set_num_threads(1)  # as ranks have: products round as theirs do
    assert run.layout.ranks == 1
    return whole(run, [run_here(run)])


def options_of(spec: Spec) -> tuple[float, float]:
    """(lr_scale, weight_decay), as the configuration means them."""
    decay = {"body": CONFIG.weight_decay, "head": CONFIG.head_weight_decay, "none": 0.0}[spec.decay]
    return CONFIG.layer_decay ** (DEPTH - spec.depth), decay


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error over parameters, relative to how far the parameter has moved."""
    start = logical(SPECS, 0)
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / (value - start[name]).abs().max()) for name, value in expected.items()
    )
