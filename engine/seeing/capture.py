"""Attention rows of a model in whatever layout: each rank computes those of its heads over its tokens of its images.

Only rows travel, to the first rank, once: neither queries and keys nor whole maps, and nothing at all between layers.
Context ranks share a row's normaliser while the pass runs, and queries, of which each is some rank's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data import Batch
from engine.assembly import Assembly
from model import MicroBatch
from model.seeing.capture import PROBE, Attended, RowsTap, Wanted, joined
from model.taps import Tap, tapped, tapping
from parallel import comm
from parallel.pipeline.execution import PipelineExecutor
from parallel.pipeline.local_stage import Head


@torch.no_grad()
def capture(assembly: Assembly, images: Tensor, wanted: Mapping[str, Wanted]) -> dict[str, Attended] | None:
    """Rows of chosen layers, heads and queries. Collective.

    Args:
        assembly: of an objective whose layers read images alone, one per sample (not `contrastive`). images: [N, C, H,
            W], the same on every rank. wanted: as model.seeing.capture.choose gives it, the same on every rank.

    Returns:
        As VisionTransformer.capture, on the first rank; None on the others.

    Raises:
        ValueError: the model has no such layers, or reads more than these images; on every rank, before they talk.
    """
    _check(assembly, wanted)
    batches = dealt(assembly, images)
    taps = {
        name: RowsTap(place, wanted[name])
        for stage in assembly.stages.values()
        for name, place in tapped(stage).items()
        if name in wanted
    }
    look(assembly, assembly.forwards(len(batches)), batches, taps)
    pieces = [piece for tap in taps.values() for piece in tap.pieces]
    found = comm.gather_objects_to_first(pieces, assembly.grid.world)
    return None if found is None else joined((piece for of in found for piece in of), wanted, len(images))


class Looking(Tap, Protocol):
    """A tap that is told which images run, by their samples' ids [B]."""

    images: Tensor | None


def look(
    assembly: Assembly, passes: PipelineExecutor, batches: Sequence[MicroBatch], taps: Mapping[str, Looking],
    head: Head = lambda outputs, batch: outputs[0],
) -> None:  # fmt: skip
    """Run micro-batches with taps, by the names of this rank's layers. Collective.

    Args:
        passes: of so many micro-batches. head: as of PipelineExecutor.run.
    """
    with ExitStack() as stack:
        for stage in assembly.stages.values():
            own = {name: taps[name] for name in tapped(stage) if name in taps}
            stack.enter_context(tapping(stage, own))
            stack.callback(stage.register_forward_pre_hook(partial(_tell, list(own.values()))).remove)
        passes.run(batches, head)


def _check(assembly: Assembly, wanted: Mapping[str, Wanted]) -> None:
    if any("texts" in layer.reads or layer.per_sample > 1 for layer in assembly.layers):
        raise ValueError(
            f"objective {assembly.config.objective} reads texts or two views of each image, capture gives one image: "
            "take the image tower by itself, VisionTransformer.from_pretrained(run).capture(images)"
        )
    there = [layer.name for layer in assembly.layers if layer.name == PROBE or "blocks" in layer.name.split(".")]
    if wrong := [name for name in wanted if name not in there]:
        raise ValueError(f"{', '.join(wrong)}: this model has no such layers, it has {', '.join(there)}")


def _tell(taps: list[Looking], _: nn.Module, given: tuple[Any, MicroBatch]) -> None:
    """Which images the stage's forward is about."""
    for tap in taps:
        tap.images = given[1].sample_ids


def dealt(assembly: Assembly, images: Tensor, multiple: int = 1) -> list[MicroBatch]:
    """This data rank's, filled up with black images of negative numbers, so that all have as many.

    Args:
        multiple: of this number.
    """
    data, micro = assembly.grid.data, assembly.config.train.micro_batch_size
    assert micro is not None
    count = -(-len(images) // (micro * data.size * multiple)) * multiple
    found = []
    for number in range(count):
        first = (number * data.size + data.index) * micro
        ids = torch.arange(first, first + micro)
        real = ids < len(images)
        pixels = images.new_zeros(micro, *images.shape[1:])
        pixels[real] = images[ids[real]]
        batch = Batch(
            images=pixels if assembly.holds_images else None,
            labels=torch.zeros_like(ids),
            sample_ids=torch.where(real, ids, -1 - ids),
            weights=real.float(),
        )
        found.append(assembly.to_device(batch, training=False))
    return found
