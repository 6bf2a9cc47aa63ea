"""From the last block's rows to class logits: final norm, pooling, classifier.

Legend: B images, S tokens, R = B * S rows, D width, H heads, K head dim, C classes, T tensor-parallel size, h = H/T.

From the pooling on every tensor rank holds whole vectors [B, D]; the matrices are still split over ranks, and so are
the
classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import Mlp
from model.build import Build
from model.inputs import MicroBatch
from model.norm import LayerNorm
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, gather_rows

_STD = 0.02


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens, then a residual MLP (Zhai et al. 2022)."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        sizes, tp = build.sizes, build.tp
        self.tokens, self.heads, self.head_dim = sizes.tokens, sizes.heads // tp.size, sizes.head_dim
        width = sizes.width
        layout = TensorLayout(shape=(1, width))
        self.probe = make_parameter(ParameterInfo(layout=layout, init=Init(kind="normal", scales=(_STD,))))
        self.q = ColumnParallelLinear(width, (width,), tp=tp, split_input=False)
        self.kv = ColumnParallelLinear(width, (width, width), tp=tp)
        self.proj = RowParallelLinear((width,), width, tp=tp, split_output=False)
        self.norm = LayerNorm(width, bias=True, partial=False, kernels=build.kernels)
        self.mlp = Mlp(build, split=False)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> [B, D], on every tensor rank."""
        b = batch.size
        q = self.q(self.probe).view(1, self.heads, 1, self.head_dim).expand(b, -1, -1, -1)
        packed = self.kv(x, b * self.tokens).view(b, self.tokens, 2, self.heads, self.head_dim)
        k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, S, K] each
        out = F.scaled_dot_product_attention(q, k, v)  # [B, h, 1, K]
        y = self.proj(out.reshape(b, -1))
        return y + self.mlp(self.norm(y), b)


class Head(nn.Module):
    """Final LayerNorm, pooling and the class-sharded classifier."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        sizes, self.tp, self.kind = build.sizes, build.tp, build.config.pool
        self.tokens, self.prefix = sizes.tokens, sizes.prefix
        bias, partial = bool(build.config.bias), build.tp.splits_rows
        self.norm = LayerNorm(sizes.width, bias=bias, partial=partial, kernels=build.kernels)
        self.pool = AttentionPool(build) if self.kind == "map" else None
        self.fc = ColumnParallelLinear(
            sizes.width,
            (sizes.classes,),
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
        tokens = gather_rows(x, self.tp, batch.size * self.tokens).unflatten(0, (batch.size, self.tokens))
        return tokens[:, 0] if self.kind == "cls" else tokens[:, self.prefix :].mean(1)  # registers have no output
