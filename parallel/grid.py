"""The grid of ranks: axes (pipeline, data, context, tensor), tensor innermost. One explicit object, made once.

Ranks that talk most sit closest: the tensor axis varies fastest, so it lies inside one host; the pipeline axis varies
slowest. This is the order of Megatron-LM's `tp-cp-dp-pp`, read from the outside in. Built on
`torch.distributed.device_mesh` with the axes that have more than one rank only: the others make no groups.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.comm import Axis, CommMeter
from parallel.host_channel import Channel, channel_bytes
from parallel.host_sharing import share
from parallel.process_group import World

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True, kw_only=True)
class GridShape:
    """How many ranks along each axis."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes in the order of AXES."""
        return self.pipeline, self.data, self.context, self.tensor

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of `rank` along each axis."""
        out = {}
        for name, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, out[name] = divmod(rank, size)
        return {name: out[name] for name in AXES}

    def ranks_along(self, names: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `names`, in grid order."""
        own, stride, found = self.coordinates(rank), 1, [0]
        for name, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            places = range(size) if name in names else (own[name],)
            found = [place * stride + other for place in places for other in found]
            stride *= size
        return tuple(found)


def shape_for_world(world_size: int, *, tensor: int, pipeline: int, context: int = 1) -> GridShape:
    """The grid of `world_size` ranks, data parallel taking what the other axes leave.

    Raises:
        ValueError: a size below 1, or a world that is not a multiple of their product.
    """
    given = {"tensor": tensor, "pipeline": pipeline, "context": context}
    for name, size in given.items():
        if size < 1:
            raise ValueError(f"parallel.{name}_parallel_size is {size}: it must be at least 1")
    model = tensor * pipeline * context
    if world_size % model:
        fits = [n for n in (world_size // model * model, (world_size // model + 1) * model) if n]
        ranks = "rank" if world_size == 1 else "ranks"
        context_text = f" x context {context}" if context > 1 else ""
        raise ValueError(
            f"{world_size} {ranks} cannot be shared among model replicas of tensor {tensor} x pipeline "
            f"{pipeline}{context_text} = {model} ranks each: start {' or '.join(map(str, fits))} ranks, or change "
            f"parallel.tensor_parallel_size{', context_parallel_size' if context > 1 else ''} or pipeline_parallel_size"
        )
    return GridShape(pipeline=pipeline, data=world_size // model, context=context, tensor=tensor)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """This rank's place on the grid, and the groups along its axes. Made by `make_grid`, passed explicitly."""

    shape: GridShape
    rank: int
    meter: CommMeter = field(default_factory=CommMeter)
    mesh: DeviceMesh | None = None
    planned: bool = False
    shared_memory: bool = False
    timeout: float = 600.0
    local_size: int = 1
    axes: dict[tuple[str, ...], Axis] = field(default_factory=dict)

    @property
    def pipeline(self) -> Axis:
        """Ranks that hold the other stages of this model replica."""
        return self.along("pipeline")

    @property
    def data(self) -> Axis:
        """Ranks that hold the same parameters and see other images."""
        return self.along("data")

    @property
    def context(self) -> Axis:
        """Ranks that hold other tokens of the same images."""
        return self.along("context")

    @property
    def tensor(self) -> Axis:
        """Ranks that hold the other parts of the same layers."""
        return self.along("tensor")

    @property
    def world(self) -> Axis:
        """All ranks."""
        return self.along(*AXES)

    def along(self, *names: str) -> Axis:
        """The ranks along one axis, or several flattened into one. Collective when it first makes a combination."""
        wanted = tuple(name for name in AXES if name in names)
        if wanted not in self.axes:
            self.axes[wanted] = self._make(wanted)
        return self.axes[wanted]

    def close(self) -> None:
        """Give back the groups (and their threads) of this grid; the world's stays. Collective."""
        groups = {id(axis.group): axis.group for axis in self.axes.values()}
        for axis in self.axes.values():
            axis.forget()
        for group in groups.values():
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self.axes.clear()

    def _make(self, names: tuple[str, ...]) -> Axis:
        ranks = self.shape.ranks_along(names, self.rank)
        group = None
        if self.planned:
            pass
        elif len(ranks) == self.shape.world_size > 1:
            group = dist.group.WORLD
        elif len(ranks) > 1:
            assert self.mesh is not None
            large = tuple(name for name in names if self.shape.sizes[AXES.index(name)] > 1)
            submesh = self.mesh[large] if len(large) == 1 else self.mesh[large]._flatten("+".join(large))
            group = submesh.get_group()
            # a group of the mesh has torch's own 10 or 30 minutes, whatever the world's has
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout), group)
        axis = Axis(
            name="+".join(names), ranks=ranks, index=ranks.index(self.rank), group=group, meter=self.meter,
            timeout=self.timeout, shares=self.shared_memory, spins=self.local_size <= len(os.sched_getaffinity(0)),
            planned=self.planned,
        )  # fmt: skip
        if group is None or not self.shared_memory or dist.get_backend(group) != "gloo":
            return axis
        unmetered = replace(axis, meter=CommMeter())
        return replace(axis, channel=_open_channel(unmetered))


def make_grid(
    shape: GridShape,
    world: World | None = None,
    device: torch.device | None = None,
    *,
    shared_memory: bool = True,
    timeout: float = 600.0,
) -> Grid:
    """Make the groups of the grid. Collective; where there are several ranks, after `process_group.start`.

    Args:
        shape: sizes of the axes. world: this process (default: a single one). device: decides the backend (default
        CPU).
        shared_memory: whether ranks on one host use it instead of TCP (CPU). timeout: seconds that calls along an axis
            wait for others.
    """
    world = world or World()
    assert shape.world_size == world.size, (shape, world)
    large = [(name, size) for name, size in zip(AXES, shape.sizes, strict=True) if size > 1]
    mesh = None
    if large:
        names, sizes = zip(*large, strict=True)
        mesh = init_device_mesh((device or torch.device("cpu")).type, sizes, mesh_dim_names=names)
    grid = Grid(
        shape=shape, rank=world.rank, mesh=mesh, shared_memory=shared_memory, timeout=timeout,
        local_size=world.local_size,
    )  # fmt: skip
    for name in AXES:
        grid.along(name)
    return grid


def world_axis(world: World) -> Axis:
    """All ranks, before they have agreed on a grid. After `process_group.start`."""
    group = dist.group.WORLD if world.size > 1 else None
    return Axis(name="world", ranks=tuple(range(world.size)), index=world.rank, group=group)


def planned_grid(shape: GridShape, rank: int, *, shared_memory: bool = False) -> Grid:
    """The grid as `rank` would see it, without any process group, for planning memory: nothing is sent.

    Args:
        shared_memory: whether ranks would be CPU processes of one host, and use it; else they have GPUs.
    """
    return Grid(shape=shape, rank=rank, planned=True, shared_memory=shared_memory)


def _open_channel(axis: Axis) -> Channel | None:
    """For the ranks of an axis, if they are processes of one host that see each other. Collective."""
    memory = share(axis, channel_bytes(axis.size))
    return None if memory is None else Channel(memory)
