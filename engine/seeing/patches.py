"""What patches are after the last block, and what the head says of each alone, of a model in whatever layout.

Each rank that runs the last layer has its tokens of its images; they go to the first rank, once.

Legend: N images, b of them in a micro-batch, n patches of an image on this rank, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.assembly import Assembly
from engine.seeing.capture import dealt
from model import MicroBatch
from model.heads import Head
from model.seeing.capture import PROBE
from model.seeing.lens import patch_logits
from parallel import comm
from parallel.tensor import gather_features, gather_rows


def features_of(assembly: Assembly, images: Tensor) -> Tensor | None:
    """Of the last stage's patches, after the last block. Collective, as all here.

    Args:
        assembly: of a model of images alone, by itself. images: [N, channels, H, W], the same on every rank.

    Returns:
        fp32 [N, rows, cols, D] on the first rank, on the CPU; None on the others.
    """
    return _of_patches(assembly, images, lambda _, x: x)


def lens_of(assembly: Assembly, images: Tensor) -> Tensor | None:
    """The logit lens, as model.seeing.lens: fp32 [N, rows, cols, C], likewise.

    Raises:
        ValueError: the head knows no patches.
    """
    classes = assembly.layers[-1].output[1]
    return _of_patches(assembly, images, lambda head, x: gather_features(patch_logits(head, x), head.tp, classes))


@dataclass(frozen=True)
class _Piece:
    """What one rank has of one micro-batch, on the CPU.

    Attributes:
        images: int64 [b], their numbers. patches: numbers of this rank's. values: fp32 [b, n, features].
    """

    images: Tensor
    patches: slice
    values: Tensor


@torch.no_grad()
def _of_patches(assembly: Assembly, images: Tensor, of: Callable[[Head, Tensor], Tensor]) -> Tensor | None:
    """What `of` makes of rows of patches [b * n, D], and of the head's part on this tensor rank; alike on all these."""
    last, grid, pieces = assembly.layers[-1], assembly.grid, list[_Piece]()
    assert last.name == PROBE, last.name

    def note(head: nn.Module, given: tuple[Tensor, MicroBatch]) -> None:
        assert isinstance(head, Head)
        (x, batch), tokens = given, head.tokens
        rows = gather_rows(x, head.tp, batch.rows(tokens.count)).unflatten(0, (batch.size, tokens.count))
        values = of(head, rows[:, tokens.own_prefix :].flatten(0, 1)).unflatten(0, (batch.size, tokens.patches))
        if grid.tensor.index == 0:
            numbers = batch.sample_ids.cpu()
            own = slice(tokens.first * tokens.cols, tokens.stop * tokens.cols)
            pieces.append(_Piece(numbers[numbers >= 0], own, values[batch.sample_ids >= 0].float().cpu()))

    batches = dealt(assembly, images)
    with ExitStack() as stack:
        if assembly.holds_loss:
            head = assembly.stages[assembly.placement.last].get_submodule(last.name)
            stack.callback(head.register_forward_pre_hook(note).remove)  # after that of ZeRO, which gathers weights
        assembly.forwards(len(batches)).run(batches, lambda outputs, _: outputs[0])
    of_ranks = comm.gather_objects_to_first(pieces, grid.world)
    if of_ranks is None:
        return None
    here, found = assembly.build.of(last).sizes.last, [piece for of_rank in of_ranks for piece in of_rank]
    whole = torch.empty(len(images), here.rows * here.cols, found[0].values.shape[2])
    for piece in found:
        whole[piece.images, piece.patches] = piece.values
    return whole.unflatten(1, (here.rows, here.cols))
