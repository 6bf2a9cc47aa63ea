r"""`python -m tools.benchmark seeing`: what class-token rollout costs beyond a forward pass, against hooks in timm.

One image, one thread, fp32; a ViT of --depth layers over --image pixels (default: ViT-L/16 at 512 x 512, 24 layers and
1025 tokens). Rows, of which each is the forward pass and the rollout after it, less the forward pass with fused
attention, which takes turns with it; CPU seconds, which other programs disturb less; medians:

- noted: ours, maps of the mean over heads noted by the forward pass (model.seeing.trace.mean_trace); of this the
  rollout that is left after the forward pass is told apart;
- again: ours, rows made again from queries and keys, as methods by gradients do;
- timm: attention written out, a hook on each softmax that keeps its maps, then A + I of each layer, normalised, and
  their product (Abnar and Zuidema 2020); less timm's own forward pass with fused attention.

Memory is the peak of tensors alive beside the weights, less that of the forward pass with fused attention.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.device import set_matmul
from engine.live_bytes import LiveBytes
from engine.precision.config import PrecisionConfig
from model import ModelConfig, VisionTransformer
from model.kernels import tune_allocator
from model.seeing.rollout import back_through
from model.seeing.trace import mean_trace, trace
from parallel.process_group import World
from tools.benchmark.table import Row, show
from tools.convert.libraries import library
from tools.options import add_json


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark seeing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, usual in (("image", 512), ("patch", 16), ("width", 1024), ("depth", 24), ("heads", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"(default {usual})")
    add_json(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tune_allocator()
    set_matmul(PrecisionConfig(), torch.device("cpu"))
    with torch.no_grad():
        show(rows(options), options.json)


def rows(options: argparse.Namespace) -> list[Row]:
    """A row for each way."""
    model = ModelConfig(
        image_size=options.image, patch_size=options.patch, width=options.width, depth=options.depth,
        num_heads=options.heads, mlp_dim=4 * options.width, num_classes=10, block="sequential", pool="cls",
        position="learned_1d", bias=True, qk_norm=False,
    )  # fmt: skip
    ours, theirs = VisionTransformer(model).eval(), timm_vit(options)
    images = torch.rand(1, 3, options.image, options.image)
    ways: dict[str, Way] = {
        "noted": Way("ours", lambda: mean_trace(ours, images), lambda noted: back_through(noted[0], "rollout")),
        "again": Way("ours", lambda: trace(ours, images), lambda noted: back_through(noted[0], "rollout")),
        "timm": Way("timm", lambda: hooked(theirs, images), product),
    }
    plain = {"ours": partial(ours.logits, images), "timm": partial(theirs, images)}
    usual = {name: peak(run) for name, run in plain.items()}  # which warms them up
    memory = {name: peak(lambda way=way: way.after(way.noting())) - usual[way.of] for name, way in ways.items()}  # type: ignore[misc]
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        forward = {name: timed(run)[0] for name, run in plain.items()}
        for name, way in ways.items():
            seconds, noted = timed(way.noting)
            rest, _ = timed(partial(way.after, noted))
            del noted
            times[name].append((forward[way.of], seconds, rest))
    found = []
    for name, measured in times.items():
        before, _, rest = (statistics.median(column) for column in zip(*measured, strict=True))
        beyond = statistics.median(seconds + after - fused for fused, seconds, after in measured)
        found.append(
            {
                "way": name, "tokens": ours.sizes.tokens, "forward_fused_ms": 1e3 * before,
                "beyond_ms": 1e3 * beyond, "after_forward_ms": 1e3 * rest, "beyond_over_forward": beyond / before,
                "memory_beyond_MiB": memory[name] / 2**20,
            }
        )  # fmt: skip
    return found


class Way(NamedTuple):
    """How rollout is found.

    Attributes:
        of: the model's name. noting: a forward pass. after: what that gives -> the class token's row.
    """

    of: str
    noting: Callable[[], Any]
    after: Callable[[Any], Any]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what it gives."""
    began = time.process_time()
    given = run()
    return time.process_time() - began, given


def peak(run: Callable[[], Any]) -> int:
    """Most bytes of tensors made by a call that lived at once."""
    with LiveBytes() as counter:
        run()
    return counter.peak


def timm_vit(options: argparse.Namespace) -> Any:
    """The same architecture of timm's, with fused attention."""
    timm = library("timm")
    model: Any = timm.models.vision_transformer.VisionTransformer(
        img_size=options.image, patch_size=options.patch, embed_dim=options.width, depth=options.depth,
        num_heads=options.heads, num_classes=10,
    )  # fmt: skip
    assert all(block.attn.fused_attn for block in model.blocks)
    return model.eval()


def hooked(model: Any, images: Tensor) -> list[Tensor]:
    """Maps [B, h, S, S] of each layer, by hooks on what comes after the softmax, written out."""
    maps, handles = list[Tensor](), []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out)))
    try:
        model(images)
    finally:
        for block, handle in zip(model.blocks, handles, strict=True):
            block.attn.fused_attn = True
            handle.remove()
    return maps


def product(maps: Sequence[Tensor]) -> Tensor:
    """The class token's row [B, S] of the published product of matrices."""
    joint = torch.eye(maps[0].shape[-1])
    for layer in maps:
        added = layer.mean(1) + torch.eye(layer.shape[-1])
        joint = (added / added.sum(-1, keepdim=True)) @ joint
    return joint[:, 0]
