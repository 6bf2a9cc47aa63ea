"""The two kinds of transformer block, both split over the tensor axis.

Legend: R = B * S rows, D width, M MLP width, T tensor-parallel size.

Under tensor parallelism a parallel block moves activations once in and once out per direction, a sequential block
twice: one all-gather and one reduce-scatter each with sequence parallelism, one all-reduce without.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention
from model.build import Build
from model.inputs import MicroBatch
from model.norm import Norm
from model.packing import Packing
from model.regions import Regions
from parallel import random
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, slice_rows
from parallel.tensor.linear import sharded_bias


class DropPath(nn.Module):
    """Stochastic depth per image (Huang et al. 2016), drawn from (seed, layer, sample) alone.

    Args:
        name: of the layer. rate: chance that an image skips the branch; what is kept is scaled by 1 / (1 - rate).
    """

    def __init__(self, name: str, rate: float, build: Build) -> None:
        super().__init__()
        self.rate, self.tp, self.tokens = rate, build.tp, build.tokens.count
        self.stream = random.key(build.seed, f"{name}.drop_path")

    def forward(self, batch: MicroBatch, dtype: torch.dtype) -> Tensor | None:
        """What this rank's rows of the branch are multiplied by [R, 1], zero for the images that skip it; None where
        none does.

        Given to the region that multiplies, not made within: backward needs no more of it, and so no product again.
        """
        if not self.rate or not batch.training:
            return None
        kept = random.uniform(self.stream, batch.sample_ids) >= self.rate
        scale = kept.to(dtype) / (1 - self.rate)
        packing = batch.packing
        rows = scale.repeat_interleave(self.tokens) if packing is None else packing.spread(scale)
        return slice_rows(rows, self.tp)[:, None]


def layer_scale(build: Build) -> nn.Parameter | None:
    """A factor per feature of a branch [D] (Touvron et al. 2021, CaiT); None where the model has none."""
    if not build.config.layer_scale:
        return None
    init = Init(kind="constant", scales=(build.config.layer_scale,))
    layout = TensorLayout(shape=(build.here.width,))
    return make_parameter(ParameterInfo(layout=layout, init=init, partial_over_tensor=build.tp.splits_rows))


def _scaled(branch: Tensor, gamma: Tensor | None, scale: Tensor | None) -> Tensor:
    """[R, D] by a factor per feature [D] and one per row [R, 1]."""
    branch = branch if gamma is None else branch * gamma
    return branch if scale is None else branch * scale


def _itself(x: Tensor) -> Tensor:
    return x


class Activation(nn.Module):
    """gelu(x + bias) in one pass, or silu(gate) * value of [gate, value] = x + bias (Shazeer 2020).

    The result may be asked for to the right of another tensor.
    """

    def __init__(self, build: Build, kind: str) -> None:
        super().__init__()
        self.kernels, self.kind = build.kernels, kind
        self.approximate = {"erf": "none"}.get(str(build.config.gelu), str(build.config.gelu))

    def forward(self, x: Tensor, bias: Tensor | None, beside: Tensor | None = None) -> Tensor:
        """[R, M], [M] -> [R, M]; gated: [R, 2 M], [2 M] -> [R, M]; beside [R, D]: -> [R, D + M]."""
        if self.kind == "gelu":
            return self.kernels.bias_gelu(x, bias, approximate=self.approximate, beside=beside)
        gate, value = (x if bias is None else x + bias).chunk(2, -1)
        y = F.silu(gate) * value
        return y if beside is None else torch.cat([beside, y], 1)


def hidden_segments(mlp: int, kind: str) -> tuple[int, ...]:
    """Of fc1's output: (M,), or gate and value."""
    return (mlp,) if kind == "gelu" else (mlp, mlp)


class Mlp(nn.Module):
    """fc1, activation, fc2 (Dosovitskiy et al. 2021).

    Args:
        regions: of the layer. kind: `gelu` or `swiglu` (default: the model's).
        split: whether rows come and go in parts under sequence parallelism.
    """

    def __init__(
        self, build: Build, regions: Regions | None = None, *, kind: str | None = None, split: bool = True
    ) -> None:
        super().__init__()
        self.regions = regions or Regions()
        here, tp, kind = build.here, build.tp, kind or build.config.mlp or "gelu"
        self.activation = Activation(build, kind)
        self.fc1 = ColumnParallelLinear(here.width, hidden_segments(here.mlp, kind), tp=tp, split_input=split)
        self.fc2 = RowParallelLinear((here.mlp,), here.width, tp=tp, split_output=split)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """[R, D] (or row parts) -> the same shape."""
        run = self.regions
        hidden = run("projection", partial(self.fc1, add_bias=False), x, run("gather", self.fc1.gather, x, rows))
        return run("output", self.fc2, run("activation", self.activation, hidden, self.fc1.bias))


def _qkv_biases(build: Build) -> tuple[bool, bool, bool]:
    """Which of q, k and v have a bias."""
    form = build.config.qkv_bias
    return form != "none", form == "all", form != "none"


class SelfAttention(nn.Module):
    """The sequential block's attention: qkv, attention, proj."""

    def __init__(self, build: Build, kind: str, regions: Regions) -> None:
        super().__init__()
        width, tp, head = build.here.width, build.tp, build.here.head_dim
        self.regions = regions
        self.qkv = ColumnParallelLinear(width, (width,) * 3, tp=tp, units=(head,) * 3, bias=_qkv_biases(build))
        self.core = Attention(build, kind, regions)
        self.proj = RowParallelLinear((width,), width, tp=tp, units=(head,))

    def forward(self, x: Tensor, rows: int, packing: Packing | None = None) -> Tensor:
        """[R, D] (or row parts) -> the same shape."""
        run = self.regions
        qkv = run("projection", self.qkv, x, run("gather", self.qkv.gather, x, rows))
        return run("output", self.proj, self.core(qkv, packing))


class SequentialBlock(nn.Module):
    """x + Attention(Norm(x)), then x + Mlp(Norm(x)): the pre-norm block of ViT-B and the like.

    Args:
        name: of the layer. drop_rate: of drop-path. kind: of attention.
    """

    def __init__(self, name: str, drop_rate: float, kind: str, build: Build) -> None:
        super().__init__()
        self.tokens = build.tokens.count
        self.norm1, self.norm2 = (
            Norm.of(build, build.here.width, from_output=build.norm_from_output) for _ in range(2)
        )
        regions = Regions(name, build.policy)
        self.attn = SelfAttention(build, kind, regions.at("attn"))
        self.mlp = Mlp(build, regions.at("mlp"))
        self.scale1, self.scale2 = (layer_scale(build) for _ in range(2))
        self.drop1 = DropPath(f"{name}.attn", drop_rate, build)
        self.drop2 = DropPath(f"{name}.mlp", drop_rate, build)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> the same shape."""
        rows, attn, mlp = batch.rows(self.tokens), self.attn.regions, self.mlp.regions
        branch = self.attn(attn("norm", self.norm1, x), rows, batch.packing)
        branch = attn("residual", self._first, branch, self.drop1(batch, branch.dtype))
        y, x = mlp("norm", self.norm2.add, branch, x)
        branch = self.mlp(y, rows)
        return mlp("residual", self._second, branch, x, self.drop2(batch, branch.dtype))

    def _first(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        return _scaled(branch, self.scale1, scale)

    def _second(self, branch: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        return x + _scaled(branch, self.scale2, scale)


class ParallelBlock(nn.Module):
    """y = Norm(x); x + Attention(y) + Mlp(y), as in ViT-22B (Dehghani et al. 2023, after Wang and Komatsuzaki 2021).

    q, k, v and fc1 are one matrix [3D + M, D]; the attention's output projection and fc2 another, [D, D + M], whose
    one bias is the sum of theirs. Where q, k and v have none, fc1's is a tensor of its own, as in the paper.
    """

    def __init__(self, name: str, drop_rate: float, kind: str, build: Build) -> None:
        super().__init__()
        here, tp, biases = build.here, build.tp, _qkv_biases(build)
        hidden = hidden_segments(here.mlp, build.config.mlp or "gelu")
        self.tokens = build.tokens.count
        self.split = (3 * build.part(here.heads) * here.head_dim, len(hidden) * build.part(here.mlp))
        self.activation = Activation(build, build.config.mlp or "gelu")
        self.norm = Norm.of(build, here.width, from_output=build.norm_from_output)
        segments, units = (*[here.width] * 3, *hidden), (*[here.head_dim] * 3, *[1] * len(hidden))
        joined = (*biases, *[any(biases)] * len(hidden))
        self.in_proj = ColumnParallelLinear(here.width, segments, tp=tp, units=units, bias=joined)
        self.regions = Regions(name, build.policy)
        self.core = Attention(build, kind, self.regions)
        self.fc1_bias = None if any(biases) else sharded_bias(hidden, tp)
        self.out_proj = RowParallelLinear((here.width, here.mlp), here.width, tp=tp, units=(here.head_dim, 1))
        self.scale = layer_scale(build)
        self.drop = DropPath(name, drop_rate, build)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> the same shape."""
        run = self.regions
        y = run("norm", self.norm, x)
        y = run("projection", self.in_proj, y, run("gather", self.in_proj.gather, y, batch.rows(self.tokens)))
        qkv, hidden = y.split(self.split, 1)
        qkv, hidden = run("qkv", _itself, qkv), run("fc1", _itself, hidden)
        y = run("activation", self.activation, hidden, self.fc1_bias, self.core(qkv, batch.packing))
        del qkv, hidden  # what is not kept goes before the next product
        y = run("output", self.out_proj, y)
        return run("residual", self._join, y, x, self.drop(batch, y.dtype))

    def _join(self, branch: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        return x + _scaled(branch, self.scale, scale)


BLOCKS: dict[str, type[SequentialBlock] | type[ParallelBlock]] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
}
