"""Attention of a layer in a few numbers, made as it runs: what is pooled, how spread heads look, how large logits are.

Large logits and heads that look at single tokens come before a loss that diverges (Dehghani et al. 2023, "Scaling
Vision Transformers to 22 Billion Parameters"), which QK norm cures.

Legend: N images, B of them in a micro-batch, S tokens of an image, c of them on this rank, H heads, h on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.seeing.measures import entropy
from model.seeing.rows import Sight, blocks_of, everywhere
from model.sizes import StageSizes
from model.taps import Tapped


@dataclass(frozen=True, kw_only=True)
class SummaryPiece:
    """What one rank knows of one layer, on the CPU.

    Attributes:
        name: of the layer. images: int64 [B], their numbers. heads: numbers of those held here. first: number of the
            first token held here. here, prefix: of the layer's stage, and tokens before its patches.
        row: [B, h, c], what the query that is pooled takes of these tokens. entropy: [B, h], of these tokens' part,
            mean over queries. top: [B, h], the largest logit; None of linear attention.
    """

    name: str
    images: Tensor
    heads: range
    first: int
    here: StageSizes
    prefix: int
    row: Tensor
    entropy: Tensor
    top: Tensor | None


class SummaryTap:
    """Summarises a layer as it runs.

    Args:
        name, layer: to be tapped. pooled: [S], the shares of queries in `row`; of a probe, which has one, [1].
        count: N.

    Attributes:
        images: int64 [B], numbers of those that run now, to be set; other than 0 to N - 1: of no interest. pieces: what
            was found.
    """

    def __init__(self, name: str, layer: Tapped, pooled: Tensor, count: int) -> None:
        self._name, self._layer, self._pooled, self._count = name, layer, pooled, count
        self.images: Tensor | None = None
        self.pieces = list[SummaryPiece]()

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Tap. Collective over context ranks."""
        assert self.images is not None
        images = self.images.cpu()
        real = (images >= 0) & (images < self._count)
        if real.any():  # context ranks have the same images
            of = real.to(q.device)
            self.pieces.append(self._summary(images[real], q.detach()[of], k.detach()[of]))
        return q, k, v

    def _summary(self, images: Tensor, q: Tensor, k: Tensor) -> SummaryPiece:
        sight, site = Sight.of(self._layer), self._layer.site
        wide = torch.promote_types(q.dtype, torch.float32)
        row = q.new_zeros(q.shape[0], q.shape[2], len(sight.own), dtype=wide)
        spread = q.new_zeros(q.shape[0], q.shape[2], dtype=wide)
        tops = list[Tensor]()
        for block in blocks_of(sight, q.shape[0] * q.shape[2]):
            chosen, keys = everywhere(sight, q, block.queries), block.of(k)
            if site.kind == "linear":
                rows = sight.rows(chosen, keys, block.queries)
            else:
                logits = sight.logits(chosen, keys, block.queries, keys=block.keys)
                if logits.numel():
                    tops.append(logits.amax((2, 3)))
                rows = sight.shares(logits)
            row[:, :, block.places] += torch.einsum("q,bhqs->bhs", self._pooled[block.queries].to(rows), rows)
            spread += entropy(rows) * len(block.queries)
        top = torch.stack(tops).amax(0).cpu() if tops else None
        return SummaryPiece(
            name=self._name, images=images, heads=site.heads, first=sight.own.start, here=site.here,
            prefix=site.tokens.prefix, row=row.cpu(), entropy=(spread / len(self._pooled)).cpu(), top=top,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of one layer and N images.

    Attributes:
        maps: fp32 [N, H, rows, cols], what is pooled takes of patches. entropy: [N, H], in nats, mean over queries.
            top: [N, H], the largest logit of any query and key; None of linear attention, which has none.
    """

    maps: Tensor
    entropy: Tensor
    top: Tensor | None


def summaries(pieces: Iterable[SummaryPiece], images: int) -> dict[str, Summary]:
    """Of all ranks' pieces, by layer; each part of a layer must be in one of them alone."""
    by_layer = dict[str, list[SummaryPiece]]()
    for piece in pieces:
        by_layer.setdefault(piece.name, []).append(piece)
    return {name: _joined(parts, images) for name, parts in by_layer.items()}


def _joined(pieces: list[SummaryPiece], images: int) -> Summary:
    here, prefix = pieces[0].here, pieces[0].prefix
    rows = torch.zeros(images, here.heads, prefix + here.rows * here.cols)
    spread, tops = torch.zeros(images, here.heads), torch.full((images, here.heads), -math.inf)
    for piece in pieces:
        place = piece.images[:, None], torch.tensor(piece.heads)
        rows[:, :, piece.first : piece.first + piece.row.shape[2]][place] = piece.row.float()
        spread[place] += piece.entropy.float()  # of context ranks each has its tokens' part
        if piece.top is not None:
            tops[place] = torch.maximum(tops[place], piece.top.float())
    maps = rows[..., prefix:].unflatten(-1, (here.rows, here.cols))
    return Summary(maps=maps, entropy=spread, top=None if pieces[0].top is None else tops)
