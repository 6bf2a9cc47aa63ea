"""From the last block's rows to class logits or pooled features: final norm, pooling, classifier.

Legend: B images, S tokens, R = B * S rows, D width, H heads, K head dim, C classes, T tensor-parallel size, h = H/T.

From the pooling on every tensor and context rank holds whole vectors [B, D]; the matrices are still split over tensor
ranks, and so are the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.blocks import Mlp
from model.build import Build
from model.inputs import MicroBatch
from model.norm import Norm
from model.packing import Packing
from model.taps import Site, Tapped
from parallel.context import attend_everywhere, share_first, sum_over
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, gather_rows
from parallel.tensor.products import attention
from parallel.tensor.segments import segment_attention

_STD = 0.02


class AttentionPool(Tapped):
    """Multi-head attention pooling: one learned probe attends to all tokens, then a residual MLP (Zhai et al. 2022)."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.site = Site.of(build, "probe")
        here, tp = build.here, build.tp
        self.tokens, self.heads, self.head_dim = build.tokens, build.part(here.heads), here.head_dim
        width, head = here.width, here.head_dim
        layout = TensorLayout(shape=(1, width))
        self.probe = make_parameter(ParameterInfo(layout=layout, init=Init(kind="normal", scales=(_STD,))))
        self.q = ColumnParallelLinear(width, (width,), tp=tp, units=(head,), split_input=False)
        self.kv = ColumnParallelLinear(width, (width, width), tp=tp, units=(head, head))
        self.proj = RowParallelLinear((width,), width, tp=tp, units=(head,), split_output=False)
        self.norm = Norm(width, bias=True, partial=False, kernels=build.kernels, eps=build.eps)
        self.mlp = Mlp(build, kind="gelu", split=False)

    def forward(self, x: Tensor, batch: MicroBatch, mask: Tensor | None = None) -> Tensor:
        """[R, D] (or this rank's rows) -> [B, D], on every tensor rank.

        Args:
            mask: bool [B, S], true for tokens that the probe sees, one at least; where no context ranks share them.
        """
        b = batch.size
        q = self.q(self.probe).view(1, self.heads, 1, self.head_dim).expand(b, -1, -1, -1)
        packed = self.kv(x, self.kv.gather(x, batch.rows(self.tokens.count)))
        if batch.packing is not None:
            return self._of_own(q[:, :, 0], packed, batch.packing)
        packed = packed.view(b, -1, 2, self.heads, self.head_dim)
        k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, S, K] each
        if self.tap is not None:
            q, k, v = (x.transpose(1, 2) for x in self.tap(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        if mask is None:
            out = attend_everywhere(q, k, v, self.tokens.context)  # [B, h, 1, K]
        else:
            assert self.tokens.context.size == 1
            out = attention(q, k, v, mask[:, None, None])
        return self._joined(out.reshape(b, -1))

    def _of_own(self, q: Tensor, packed: Tensor, packing: Packing) -> Tensor:
        """Each image's probe [B, h, K] to its own rows of keys and values [R, 2 * h * K] -> [B, D]."""
        k, v = packed.unflatten(1, (2, self.heads, self.head_dim)).unbind(1)
        return self._joined(segment_attention(q, k, v, (1,) * len(q), packing.lengths).flatten(1))

    def _joined(self, heads: Tensor) -> Tensor:
        """What the heads give [B, h * K] -> [B, D]."""
        y = self.proj(heads)
        return y + self.mlp(self.norm(y), y.shape[0])


class Head(nn.Module):
    """Final norm and pooling, in this order or the other, and the class-sharded classifier.

    Two class tokens have a classifier each, whose logits are averaged (Touvron et al. 2021, DeiT). Without classes the
    pooled features are what comes out.

    Args:
        beside: whether the pooled features come out beside the logits, if there are any, those of two class tokens as
            their mean.
    """

    def __init__(self, build: Build, *, beside: bool = False) -> None:
        super().__init__()
        self.beside = beside
        self.tp, self.kind, self.tokens = build.tp, build.config.pool, build.tokens
        self.class_tokens, self.norm_last = build.sizes.class_tokens, bool(build.config.norm_after_pool)
        width = build.here.width
        features = self.features = pooled_features(build)
        self.norm = Norm.of(build, features, partial=False) if self.norm_last else Norm.of(build, width)
        self.pool = AttentionPool(build) if self.kind == "map" else None
        own = build.sizes.classes > 0
        self.fc = classifier(build, features) if own else None
        self.fc_distill = classifier(build, features) if own and self.class_tokens == 2 else None

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> logits [B, C/T] of this rank's classes; without classes [B, D], or [B, 2D]
        of class token and mean, on every tensor rank. `beside`: both, [B, C/T + D]."""
        if self.norm_last:
            outputs = [self.norm(pooled) for pooled in self._pooled(x, batch)]
        else:
            outputs = self._pooled(self.norm(x), batch)
        features = outputs
        if self.fc is not None:
            outputs = [fc(y) for fc, y in zip((self.fc, self.fc_distill), outputs, strict=False) if fc is not None]
        if self.beside and self.fc is not None:
            return torch.cat([_mean_of(outputs), _mean_of(features)], 1)
        return _mean_of(outputs)

    def _pooled(self, x: Tensor, batch: MicroBatch) -> list[Tensor]:
        """One vector per image [B, D], or that of each of two class tokens."""
        if self.pool is not None:
            return [self.pool(x, batch)]
        rows = gather_rows(x, self.tp, batch.rows(self.tokens.count))
        if self.kind == "gap":
            return [self._mean(rows, batch)]
        own = self._class_tokens(rows, batch)
        return own if self.kind == "cls" else [torch.cat([own[0], self._mean(rows, batch)], 1)]

    def _class_tokens(self, rows: Tensor, batch: MicroBatch) -> list[Tensor]:
        """[R, D] -> [B, D] of each."""
        t, count = self.tokens, self.class_tokens
        if batch.packing is not None:
            return [rows[batch.packing.firsts + n] for n in range(count)]
        tokens = rows.unflatten(0, (batch.size, t.count))
        return list(share_first(tokens, min(count, t.own_prefix), count, t.context).unbind(1))

    def _mean(self, rows: Tensor, batch: MicroBatch) -> Tensor:
        """Of the patches: prefix tokens have no part in it. [R, D] -> [B, D]."""
        t, wide = self.tokens, torch.promote_types(rows.dtype, torch.float32)
        if (packing := batch.packing) is not None:
            each = (own[packing.prefix :] for own in packing.split(rows))
            return torch.stack([own.sum(0, dtype=wide) / len(own) for own in each]).to(rows.dtype)
        patches = rows.unflatten(0, (batch.size, t.count))[:, t.own_prefix :].sum(1, dtype=wide)
        return (sum_over(patches, t.context) / (t.rows * t.cols)).to(rows.dtype)


def _mean_of(each: list[Tensor]) -> Tensor:
    """Of one or two."""
    return each[0] if len(each) == 1 else (each[0] + each[1]) / 2


def pooled_features(build: Build) -> int:
    """Of the vector that a model's tokens are pooled to."""
    return build.sizes.last.width * (2 if build.config.pool == "cls_gap" else 1)


def classifier(build: Build, features: int) -> ColumnParallelLinear:
    """[B, D] -> [B, C/T]: classes, or the features of an embedding, split over tensor ranks."""
    return ColumnParallelLinear(
        features,
        (build.sizes.classes,),
        tp=build.tp,
        split_input=False,
        bias=bool(build.config.classifier_bias),
        init=Init(kind="truncated_normal", scales=(_STD,)),
        bias_init=build.config.head_bias or 0.0,
        decay="head",
    )
