"""The toy pipeline by which executors are compared: stages that do next to nothing, so that what is left is the cost of
running them. Here what both sides have in common, and ours; `toys_torch` has the other.

A stage multiplies its input by a vector of weights (`scale`) or by a matrix (`linear`), or hands it on (`empty`, which
torch's cannot: their weights must have gradients).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.grid import Grid, GridShape, make_grid
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.pipeline import build_schedule
from parallel.pipeline.boundary import TensorSpec
from parallel.pipeline.execution import PipelineExecutor
from parallel.pipeline.readiness import Policy
from parallel.process_group import World
from parallel.sharding import ParameterStore
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel
from tools.benchmark.resident import forget_peak, resident_bytes
from tools.benchmark.sleepers import Postponed

STAGES = ("scale", "linear", "empty")
CARRIERS = ("shared_memory", "gloo")  # of our messages; torch's go over gloo
TORCH_SCHEDULES = ("1f1b", "interleaved", "zb_v")  # that both sides have
_CPU = torch.device("cpu")
_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What is run.

    Attributes:
        rows, width: of what flows. stage: one of STAGES. policy, carrier: of ours alone; the latter one of CARRIERS.
    """

    schedule: str
    micro_batches: int
    virtual_stages: int | None
    rows: int
    width: int
    stage: str
    policy: Policy = "static"
    carrier: str = CARRIERS[0]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What passes cost a rank.

    Attributes:
        spans: start and end of each pass, by the clock that processes of a host share. cpu: seconds of all its threads
            in all of them. grown: bytes that the process grew at most beyond what it had before the first.
    """

    spans: list[tuple[float, float]]
    cpu: float
    grown: int


class Toys:
    """One rank of the engine, with stages of its own kinds of layers."""

    def __init__(self, world: World, grid: Grid) -> None:
        """Collective over the world, all of which is the pipeline."""
        over_gloo = make_grid(GridShape(pipeline=world.size), world, shared_memory=False)
        self._grids = dict(zip(CARRIERS, (grid, over_gloo), strict=True))

    def prepare(self, toy: Toy) -> Callable[[], object]:
        """What runs a pass. Collective."""
        grid = self._grids[toy.carrier]
        axis = grid.pipeline
        schedule = build_schedule(toy.schedule, axis.size, toy.micro_batches, toy.virtual_stages)
        stages = {number: _Stage(toy) for number in schedule.stages_of(axis.index)}
        layers = [[(str(number), stage)] for number, stage in stages.items()]
        store = ParameterStore(layers, grid=grid, device=_CPU, seed=0) if toy.stage != "empty" else None
        spec = TensorSpec((toy.rows, toy.width))
        executor = PipelineExecutor(
            schedule,
            stages,
            [(), *[(spec,)] * (schedule.num_stages - 1)],
            axis=axis,
            device=_CPU,
            deferrer=store.gradients if store is not None else Postponed(),
            policy=toy.policy,
        )
        batch = torch.ones(toy.micro_batches * toy.rows, toy.width)

        def run() -> None:
            if store is not None:
                store.gradients.start(toy.micro_batches)
            executor.run(batch.chunk(toy.micro_batches), lambda outputs, _: outputs[0].sum())
            if store is not None:
                store.gradients.finish()

        return run


class _Stage(nn.Module):
    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.layer: nn.Module
        match toy.stage:
            case "linear":
                self.layer = ColumnParallelLinear(toy.width, (toy.width,), tp=no_tensor_parallel())
            case "scale":
                self.layer = _Scale(toy)
            case _:
                self.layer = _Empty()

    def forward(self, inputs: tuple[Tensor, ...], micro_batch: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(inputs[0] if inputs else micro_batch),)


class _Scale(nn.Module):
    def __init__(self, toy: Toy) -> None:
        super().__init__()
        one = Init(kind="constant", scales=(1.0,))
        self.scale = make_parameter(ParameterInfo(layout=TensorLayout(shape=(toy.width,)), init=one, decay="body"))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _HandOn.apply(x, self.weight)
        return y


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Measured:
    """Times passes of one program or the other, by the same barrier and the same clock.

    Args:
        prepare: makes what runs a pass. grid: whose ranks start together.
    """

    def __init__(self, prepare: Callable[[Toy], Callable[[], object]], grid: Grid) -> None:
        self._prepare, self._grid = prepare, grid
        self._passes: dict[Toy, Callable[[], object]] = {}

    def run(self, toy: Toy, passes: int) -> Costs:
        """So many passes after some that warm up. Collective."""
        before = forget_peak()
        run = self._passes.get(toy)
        if run is None:
            run = self._passes[toy] = self._prepare(toy)
        for _ in range(_WARMUP):
            run()
        spans, cpu = [], 0.0
        for _ in range(passes):
            comm.barrier(self._grid.world)
            began, used = time.perf_counter(), time.process_time()
            run()
            spans.append((began, time.perf_counter()))
            cpu += time.process_time() - used
        return Costs(spans=spans, cpu=cpu, grown=resident_bytes("VmHWM") - before)
