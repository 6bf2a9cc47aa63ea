"""The toy pipeline of `toys` under torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from parallel.process_group import World
from tools.benchmark.toys import Toy

_CPU = torch.device("cpu")
SCHEDULES = {"1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B, "zb_v": ScheduleZBVZeroBubble}


class TorchToys:
    """One rank."""

    def __init__(self, world: World) -> None:
        """Collective over the world, all of which is the pipeline."""
        self._world = world

    def prepare(self, toy: Toy) -> Callable[[], object]:
        """What runs a pass."""
        rank, ranks = self._world.rank, self._world.size
        modules = {number: _module(toy) for number in stages_of(toy.schedule, rank, ranks, toy.virtual_stages)}
        total = ranks * len(modules)
        example = torch.ones(toy.rows, toy.width)
        stages = [make_stage(module, number, total, example, example) for number, module in modules.items()]
        schedule = schedule_of(toy.schedule, stages, toy.micro_batches, lambda output, target: output.sum())
        batch = torch.ones(toy.micro_batches * toy.rows, toy.width)
        parameters = [p for module in modules.values() for p in module.parameters()]

        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            one_pass(schedule, stages, batch, batch)

        return run


def stages_of(name: str, rank: int, ranks: int, virtual_stages: int | None) -> list[int]:
    """The stages of a rank."""
    if name == "zb_v":
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, ranks * (virtual_stages or 2), ranks)) if name == "interleaved" else [rank]


def make_stage(module: nn.Module, number: int, total: int, inputs: Tensor, outputs: Tensor) -> PipelineStage:
    """Shapes are told, so that none are sent; all that flows between stages carries a gradient."""
    return PipelineStage(
        module,
        number,
        total,
        _CPU,
        input_args=inputs.detach().requires_grad_(number > 0),
        output_args=outputs.detach().requires_grad_(),
    )


def schedule_of(name: str, stages: list[PipelineStage], micro_batches: int, loss: Callable[..., Tensor]) -> Any:
    """Of torch, over the stages of a rank; gradients are left as sums over micro-batches."""
    kind: Any = SCHEDULES[name]
    return kind(stages[0] if name == "1f1b" else stages, micro_batches, loss_fn=loss, scale_grads=False)


def one_pass(schedule: Any, stages: list[PipelineStage], batch: Tensor, target: Tensor) -> list[Tensor]:
    """Forward and backward of all micro-batches; the losses, where this rank has the last stage."""
    losses: list[Tensor] = []
    is_last = any(stage.is_last for stage in stages)
    schedule.step(
        *((batch,) if any(stage.is_first for stage in stages) else ()),
        **({"target": target, "losses": losses} if is_last else {}),
        return_outputs=False,
    )
    return losses


def _module(toy: Toy) -> nn.Module:
    return nn.Linear(toy.width, toy.width) if toy.stage == "linear" else _Scale(toy.width)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale
