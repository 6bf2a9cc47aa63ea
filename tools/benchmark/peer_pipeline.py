"""EagerViT cut into the engine's own stages, under torch.distributed.pipelining: of `tools.benchmark.peer_programs`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.process_group import read_world
from tools.benchmark.eager_vit import EagerSizes, EagerViT
from tools.benchmark.peer_programs import Step, Task
from tools.benchmark.peer_torch import adamw, fill, set_matmul
from tools.benchmark.toys_torch import make_stage, one_pass, schedule_of, stages_of


def torch_pipeline(task: Task) -> Step:
    """A step of the schedule, then fused AdamW.

    task.settings: schedule, virtual_stages, micro_batches; cut: of each stage the first of its layers (embedding,
    blocks, head) and the one after its last.
    """
    set_matmul(task)
    world, settings = read_world(), task.settings
    dist.init_process_group("gloo")
    sizes, cut, count = EagerSizes(**task.sizes), settings["cut"], settings["micro_batches"]
    batches = list(task.own_batches())
    own = stages_of(settings["schedule"], world.rank, world.size, settings["virtual_stages"])
    pieces = {number: Piece(sizes, range(*cut[number])) for number in own}
    for piece in pieces.values():
        fill(piece, task)
    images = batches[0][0][: len(batches[0][0]) // count]
    tokens = torch.empty(len(images), sizes.tokens, sizes.width)
    stages = [
        make_stage(
            piece, number, len(cut), tokens if number else images,
            tokens if number + 1 < len(cut) else torch.empty(len(images), sizes.classes),
        )
        for number, piece in pieces.items()
    ]  # fmt: skip
    schedule = schedule_of(
        settings["schedule"], stages, count, lambda output, target: F.cross_entropy(output, target) / count
    )
    optimizer = adamw(nn.ModuleList(pieces.values()), task)

    def step(number: int) -> float:
        images, labels = batches[number % len(batches)]
        optimizer.zero_grad()
        losses = one_pass(schedule, stages, images, labels)
        total = torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros(())
        dist.all_reduce(total)  # as the engine does: every rank knows the loss
        optimizer.step()
        return total.item()

    return step


class Piece(EagerViT):
    """Some of the layers of EagerViT, in a row; they are called as in the whole. With the first it takes images.

    Args:
        layers: 0 is the embedding, then come blocks, the last is norm and head.
    """

    def __init__(self, sizes: EagerSizes, layers: range) -> None:
        with torch.device("meta"):
            super().__init__(sizes)
        kept = {str(layer - 1): self.blocks[layer - 1] for layer in layers if 0 < layer <= sizes.depth}
        self.blocks = nn.Sequential()
        for name, block in kept.items():
            self.blocks.add_module(name, block)
        self.embeds, self.classifies = 0 in layers, sizes.depth + 1 in layers
        if not self.embeds:
            del self.patch, self.cls, self.pos
        if not self.classifies:
            del self.norm, self.head
        self.to_empty(device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, S, D] -> [B, S, D] or [B, classes]."""
        x = self.blocks(self.embed(x) if self.embeds else x)
        return self.classify(x) if self.classifies else x
