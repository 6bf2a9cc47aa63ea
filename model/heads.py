"""From the last block's rows to class logits: final norm, pooling, classifier.

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
from parallel.context import attend_everywhere, share_first, sum_over
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, gather_rows

_STD = 0.02


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens, then a residual MLP (Zhai et al. 2022)."""

    def __init__(self, build: Build) -> None:
        super().__init__()
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

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> [B, D], on every tensor rank."""
        b = batch.size
        q = self.q(self.probe).view(1, self.heads, 1, self.head_dim).expand(b, -1, -1, -1)
        packed = self.kv(x, b * self.tokens.count).view(b, -1, 2, self.heads, self.head_dim)
        k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, S, K] each
        out = attend_everywhere(q, k, v, self.tokens.context)  # [B, h, 1, K]
        y = self.proj(out.reshape(b, -1))
        return y + self.mlp(self.norm(y), b)


class Head(nn.Module):
    """Final LayerNorm, pooling and the class-sharded classifier."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.tp, self.kind, self.tokens = build.tp, build.config.pool, build.tokens
        self.norm = Norm.of(build, build.here.width)
        self.pool = AttentionPool(build) if self.kind == "map" else None
        self.fc = ColumnParallelLinear(
            build.here.width,
            (build.sizes.classes,),
            tp=build.tp,
            split_input=False,
            init=Init(kind="truncated_normal", scales=(_STD,)),
            bias_init=build.config.head_bias or 0.0,
            decay="head",
        )

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> logits [B, C/T] of this rank's classes."""
        x = self.norm(x)
        return self.fc(self._pooled(x, batch))

    def _pooled(self, x: Tensor, batch: MicroBatch) -> Tensor:
        if self.pool is not None:
            return self.pool(x, batch)
        t = self.tokens
        tokens = gather_rows(x, self.tp, batch.size * t.count).unflatten(0, (batch.size, t.count))
        if self.kind == "cls":
            return share_first(tokens, min(1, t.own_prefix), 1, t.context)[:, 0]
        patches = tokens[:, t.own_prefix :].sum(
            1, dtype=torch.promote_types(tokens.dtype, torch.float32)
        )  # registers and global tokens have no output
        return (sum_over(patches, t.context) / (t.rows * t.cols)).to(x.dtype)
