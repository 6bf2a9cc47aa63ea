r"""`python -m tools.benchmark context`: full attention over ranks that share an image, all-to-all against a ring.

All-to-all is what the engine does (model.attention.FullAttention); the ring (Liu et al. 2023, Ring Attention) is
written here: keys and values go round while each rank attends to the block that it holds, partial results being merged
by their log-sum-exp. Both forward and backward, taking turns, and held to the same result.

    python -m tools.launch --nproc-per-node 2 -m tools.benchmark context --tokens 4096 --width 1024 --heads 16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.device import prepare_cpu
from model import Build, ModelConfig
from model.attention import FullAttention
from parallel import comm, process_group
from parallel.comm import Axis
from parallel.grid import GridShape, make_grid
from parallel.messages import exchange_start
from parallel.process_group import World
from tools.benchmark.bench import seconds
from tools.benchmark.table import show
from tools.options import add_json

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Ring(torch.autograd.Function):
    """[B, h, S, K] of q, k, v on each rank -> attention of its queries to all ranks' tokens; equal S on all ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
        block, out, lse = torch.stack([k, v]), None, None
        for hop in range(axis.size):
            moving = _pass_on(block, axis) if hop < axis.size - 1 else None
            part, part_lse = _flash(q, block[0], block[1])
            if out is None or lse is None:
                out, lse = part, part_lse
            else:
                total = torch.logaddexp(lse, part_lse)
                out = out * _weight(lse - total, out) + part * _weight(part_lse - total, out)
                lse = total
            block = moving() if moving is not None else block
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.axis = axis
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        block, sums, dq = torch.stack([k, v]), torch.zeros_like(torch.stack([k, v])), torch.zeros_like(q)
        for hop in range(ctx.axis.size):
            moving = _pass_on(block, ctx.axis) if hop < ctx.axis.size - 1 else None
            parts = _flash_backward(grads[0], q, block[0], block[1], out, lse, 0.0, False)
            dq += parts[0]
            sums[0] += parts[1]
            sums[1] += parts[2]
            sums = _pass_on(sums, ctx.axis)()  # the sums travel with their block, and arrive home
            block = moving() if moving is not None else block
        return dq, sums[0], sums[1], None


def _weight(log: Tensor, like: Tensor) -> Tensor:
    """exp of a log-sum-exp difference [B, S, h] or [B, h, S], for [B, h, S, K]."""
    return torch.exp(log if log.shape == like.shape[:3] else log.transpose(1, 2))[..., None]


def _pass_on(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Send `x` to the next rank; returns a function that waits for that of the one before."""
    x, received = x.contiguous(), torch.empty_like(x)
    before, after = (axis.index - 1) % axis.size, (axis.index + 1) % axis.size
    exchange = exchange_start([(x, after)], [(received, before)], axis)

    def take() -> Tensor:
        exchange.wait()
        return received

    return take


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tools.benchmark context", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of the image, a square that the ranks divide")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    add_json(parser)
    options = parser.parse_args(argv)
    cpu = torch.device("cpu")
    prepare_cpu(world)
    process_group.start(world, cpu, 600.0)
    axis = make_grid(GridShape(context=world.size), world).context
    side = int(options.tokens**0.5)
    config = ModelConfig(
        width=options.width, depth=1, num_heads=options.heads, image_size=side, patch_size=1, pool="gap"
    )
    layer = FullAttention(Build(config=config.resolve(), context=axis), "full")
    shape = (1, options.tokens // world.size, options.heads, options.width // options.heads)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape)

    def all_to_all() -> tuple[Tensor, ...]:
        out = layer(q, k, v)
        return out, *torch.autograd.grad(out, [q, k, v], grad)

    def ring() -> tuple[Tensor, ...]:
        out = _Ring.apply(*(x.transpose(1, 2) for x in (q, k, v)), axis).transpose(1, 2)
        return out, *torch.autograd.grad(out, [q, k, v], grad)

    for ours, other in zip(all_to_all(), ring(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {"all-to-all": [], "ring": []}
    for _ in range(options.rounds):
        for name, run in (("all-to-all", all_to_all), ("ring", ring)):
            comm.barrier(axis)
            times[name].append(seconds(run, cpu))
    if world.rank == 0:
        ratios = {n: statistics.median(a / b for a, b in zip(t, times["ring"], strict=True)) for n, t in times.items()}
        common = {"ranks": world.size, "tokens": options.tokens, "width": options.width}
        rows = [
            {**common, "form": name, "ms": 1000 * statistics.median(t), "time_over_ring": ratios[name]}
            for name, t in times.items()
        ]
        show(rows, options.json)
    process_group.stop()
