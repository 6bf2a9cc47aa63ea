"""The two kinds of transformer block, both split over the tensor axis.

Legend: R = B * S rows, D width, M MLP width, T tensor-parallel size.

Under tensor parallelism a parallel block moves activations once in and once out per direction, a sequential block
twice: one all-gather and one reduce-scatter each with sequence parallelism, one all-reduce without.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.build import Build
from model.inputs import MicroBatch
from model.norm import LayerNorm
from parallel import random
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, slice_rows
from parallel.tensor.linear import sharded_bias


class DropPath(nn.Module):
    """Stochastic depth per image (Huang et al. 2016), drawn from (seed, layer, sample) alone.

    Args:
        name: of the layer. rate: chance that an image skips the branch; what is kept is scaled by 1 / (1 - rate).
    """

    def __init__(self, name: str, rate: float, build: Build) -> None:
        super().__init__()
        self.rate, self.tp, self.tokens = rate, build.tp, build.sizes.tokens
        self.stream = random.key(build.seed, f"{name}.drop_path")

    def forward(self, branch: Tensor, batch: MicroBatch) -> Tensor:
        """Rows of a branch -> the same, zero for the images that skip it."""
        if not self.rate or not batch.training:
            return branch
        kept = random.uniform(self.stream, batch.sample_ids) >= self.rate
        scale = kept.to(branch.dtype) / (1 - self.rate)
        return branch * slice_rows(scale.repeat_interleave(self.tokens), self.tp)[:, None]


class Gelu(nn.Module):
    """gelu(x + bias), in one pass."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.kernels, self.approximate = build.kernels, "none" if build.config.gelu == "erf" else "tanh"

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[R, M], [M] -> [R, M]."""
        return self.kernels.bias_gelu(x, bias, approximate=self.approximate)


class Mlp(nn.Module):
    """fc1, GELU, fc2 (Dosovitskiy et al. 2021).

    Args:
        split: whether rows come and go in parts under sequence parallelism.
    """

    def __init__(self, build: Build, *, split: bool = True) -> None:
        super().__init__()
        sizes, tp = build.sizes, build.tp
        self.gelu = Gelu(build)
        self.fc1 = ColumnParallelLinear(sizes.width, (sizes.mlp,), tp=tp, split_input=split)
        self.fc2 = RowParallelLinear((sizes.mlp,), sizes.width, tp=tp, split_output=split)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """[R, D] (or row parts) -> the same shape."""
        return self.fc2(self.gelu(self.fc1(x, rows, add_bias=False), self.fc1.bias))


class SelfAttention(nn.Module):
    """The sequential block's attention: qkv, attention, proj."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        width, tp = build.sizes.width, build.tp
        self.qkv = ColumnParallelLinear(width, (width,) * 3, tp=tp, bias=bool(build.config.bias))
        self.core = Attention(build)
        self.proj = RowParallelLinear((width,), width, tp=tp)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """[R, D] (or row parts) -> the same shape."""
        return self.proj(self.core(self.qkv(x, rows)))


class SequentialBlock(nn.Module):
    """x + Attention(Norm(x)), then x + Mlp(Norm(x)): the pre-norm block of ViT-B and the like."""

    def __init__(self, name: str, drop_rate: float, build: Build) -> None:
        super().__init__()
        self.tokens = build.sizes.tokens
        norm = partial(
            LayerNorm,
            build.sizes.width,
            bias=bool(build.config.bias),
            partial=build.tp.splits_rows,
            kernels=build.kernels,
        )
        self.norm1 = norm()
        self.attn = SelfAttention(build)
        self.norm2 = norm()
        self.mlp = Mlp(build)
        self.drop1 = DropPath(f"{name}.attn", drop_rate, build)
        self.drop2 = DropPath(f"{name}.mlp", drop_rate, build)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> the same shape."""
        rows = batch.size * self.tokens
        y, x = self.norm2.add(self.drop1(self.attn(self.norm1(x), rows), batch), x)
        return x + self.drop2(self.mlp(y, rows), batch)


class ParallelBlock(nn.Module):
    """y = Norm(x); x + Attention(y) + Mlp(y), as in ViT-22B (Dehghani et al. 2023, after Wang and Komatsuzaki 2021).

    q, k, v and fc1 are one matrix [3D + M, D]; the attention's output projection and fc2 another, [D, D + M], whose
    one bias is the sum of theirs. Without `bias`, only fc1 and the output have one, as in the paper.
    """

    def __init__(self, name: str, drop_rate: float, build: Build) -> None:
        super().__init__()
        sizes, tp, bias = build.sizes, build.tp, bool(build.config.bias)
        self.tokens = sizes.tokens
        self.split = (3 * sizes.width // tp.size, sizes.mlp // tp.size)
        self.gelu = Gelu(build)
        self.norm = LayerNorm(sizes.width, bias=bias, partial=tp.splits_rows, kernels=build.kernels)
        segments = (*[sizes.width] * 3, sizes.mlp)
        self.in_proj = ColumnParallelLinear(sizes.width, segments, tp=tp, bias=bias)
        self.core = Attention(build)
        self.fc1_bias = None if bias else sharded_bias((sizes.mlp,), tp)
        self.out_proj = RowParallelLinear((sizes.width, sizes.mlp), sizes.width, tp=tp)
        self.drop = DropPath(name, drop_rate, build)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> the same shape."""
        y = self.in_proj(self.norm(x), batch.size * self.tokens)
        qkv, hidden = y.split(self.split, 1)
        branch = torch.cat([self.core(qkv), self.gelu(hidden, self.fc1_bias)], 1)
        return x + self.drop(self.out_proj(branch), batch)


BLOCKS: dict[str, type[SequentialBlock] | type[ParallelBlock]] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
}
