"""The ends of a text tower, whose blocks are those of any ViT: from tokens to rows, and from rows to an embedding.

Legend: B texts, S tokens of each, R = B * S rows, V vocabulary, D width, E embedding, T tensor-parallel size.

Every rank holds all tokens of a text: context ranks, which share those of images, compute the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model.build import Build
from model.embed import add_in_turn
from model.heads import AttentionPool, classifier
from model.inputs import MicroBatch
from model.norm import Norm
from model.projection import Projection, Projector
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import VocabularyEmbedding, gather_rows

Pool = Literal["eos", "last", "mean", "map"]
"""eos: the token at the first end token; last: the last of all, whatever it is; mean: of all up to the first end token;
map: a learned probe attends to these."""

_TOKEN_STD, _POSITION_STD = 0.02, 0.01  # Radford et al. 2021, CLIP


class TextEmbedding(nn.Module):
    """Vectors of tokens, whose table's rows are split over tensor ranks, plus learned positions.

    Args:
        vocabulary: V.
    """

    def __init__(self, build: Build, *, vocabulary: int) -> None:
        super().__init__()
        self.tp, self.length, width = build.tp, build.tokens.count, build.here.width
        init = Init(kind="normal", scales=(_TOKEN_STD,))
        self.token = VocabularyEmbedding(vocabulary, width, tp=build.tp, init=init)
        init, layout = Init(kind="normal", scales=(_POSITION_STD,)), TensorLayout(shape=(self.length, width))
        self.pos = make_parameter(ParameterInfo(layout=layout, init=init, partial_over_tensor=build.tp.splits_rows))

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """Texts of the micro-batch -> [R, D], or this rank's rows of it."""
        texts = batch.texts
        assert texts is not None
        if texts.shape[1] != self.length:
            raise ValueError(
                f"texts have {texts.shape[1]} tokens, but the model takes {self.length}: cut or fill them up to that, "
                "or set text.context_length"
            )
        y = self.token(texts)
        if self.tp.splits_rows:
            return add_in_turn(y, self.pos, self.tp.row_range(texts.numel())[0])
        return (y.unflatten(0, texts.shape) + self.pos).flatten(0, 1)


def ends(texts: Tensor, end_token: int) -> Tensor:
    """Place of the first end token of each text, or of its last token where it has none: [B, S] -> int64 [B]."""
    found = texts == end_token
    return torch.where(found.any(1), found.int().argmax(1), texts.shape[1] - 1)


class TextHead(nn.Module):
    """Final norm, pooling, projection. A token is picked before it is normed, which gives the same.

    Args:
        pool: of Pool. end_token: its number. projection: of Projection; linear: as the configuration's classifier says.
            outputs: E.
    """

    def __init__(self, build: Build, *, pool: Pool, end_token: int, projection: Projection, outputs: int) -> None:
        super().__init__()
        self.tp, self.length, self.kind, self.end_token = build.tp, build.tokens.count, pool, end_token
        width = build.here.width
        self.picks = pool in ("eos", "last")
        self.norm = Norm.of(build, width, partial=False if self.picks else None)
        self.pool = AttentionPool(build) if pool == "map" else None
        self.fc = classifier(build, width) if projection == "linear" else None
        self.project = Projector(build, width, outputs) if projection == "mlp" else None

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> [B, E/T] of this tensor rank; with an MLP, or none, [B, E] on each."""
        y = self.norm(self._picked(x, batch)) if self.picks else self._pooled(self.norm(x), batch)
        if self.project is not None:
            y = self.project(y)
        return y if self.fc is None else self.fc(y)

    def _ends(self, batch: MicroBatch) -> Tensor:
        assert batch.texts is not None
        return ends(batch.texts, self.end_token)

    def _all(self, x: Tensor, batch: MicroBatch) -> Tensor:
        return gather_rows(x, self.tp, batch.size * self.length)

    def _picked(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """One row per text: [B, D]."""
        first = torch.arange(batch.size, device=x.device) * self.length
        at = self._ends(batch) if self.kind == "eos" else self.length - 1
        return self._all(x, batch).index_select(0, first + at)

    def _pooled(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """Of the tokens up to the end of each text: [B, D]."""
        count = self._ends(batch)[:, None] + 1
        own = torch.arange(self.length, device=x.device) < count  # [B, S]
        if self.pool is not None:
            y: Tensor = self.pool(x, batch, own)
            return y
        tokens = self._all(x, batch).unflatten(0, own.shape)
        total = (tokens * own[:, :, None]).sum(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        return (total / count).to(tokens.dtype)
