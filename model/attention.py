"""Multi-head self-attention on packed rows of q, k and v, of every kind.

Legend: B images, S tokens that this rank holds of each, P of them prefix tokens, H heads, K head dim, h heads on this
tensor rank.

Which tokens see which, with class token, registers and global tokens together called the prefix:
- full, linear: all see all;
- causal: each sees itself and those before it, in the order prefix, then patches row by row (or a text's tokens);
- window, shifted_window, grid: patches see the patches of their group; prefix tokens see all;
- global_tokens: patches see their window and the prefix; prefix tokens see all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.groups import GroupPlan, groups_of
from model.kernels.reference import depthwise_conv
from model.packing import Packing
from model.qk_norm import QkNorm, qk_norm
from model.regions import Regions
from model.relative import relative_bias, relative_table
from model.sizes import Tokens
from model.tables import WithTables
from model.taps import Site, Tapped
from parallel import comm
from parallel.comm import single_axis
from parallel.context import attend_everywhere, heads_to_tokens, share_first, sum_over, tokens_to_heads
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor.biased import biased_attention
from parallel.tensor.products import attention
from parallel.tensor.segments import segment_attention

DENOMINATOR = 1e-6  # added to that of linear attention


class Mixer(Protocol):
    """Mixes tokens."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, S, h, K] each -> [B, S, h, K]."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Fused attention with heads after tokens: [B, S, h, K] each -> [B, S, h, K]."""
    out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, causal=causal)
    return out.transpose(1, 2)


class FullAttention(nn.Module):
    """Softmax attention of all tokens to all tokens, or, `causal`, to those before them; over a context axis each rank
    takes a share of the heads."""

    def __init__(self, build: Build, kind: str) -> None:
        super().__init__()
        self.tokens, self.causal, self.kernels = build.tokens, kind == "causal", build.kernels

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Mixer."""
        axis, heads = self.tokens.context, q.shape[2]
        if axis.size == 1:
            return softmax_attention(q, k, v, causal=self.causal)
        q, k, v = tokens_to_heads(torch.stack([q, k, v]), self.tokens.counts, axis).unbind(0)
        out = softmax_attention(q, k, v, causal=self.causal)
        return heads_to_tokens(out, heads, self.tokens.counts, axis)


class GroupedAttention(nn.Module):
    """Softmax attention inside groups of patches, the groups folded into the batch; in windows perhaps with a table of
    relative positions."""

    def __init__(self, build: Build, kind: str) -> None:
        super().__init__()
        here, self.tokens, self.sees_prefix = build.here, build.tokens, kind == "global_tokens"
        self.plan = GroupPlan(groups_of(kind, here), build.tokens)
        self.sides = here.window_sides
        self.relative_position = relative_table(build) if build.config.relative_position else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Mixer."""
        own, prefix, axis = self.tokens.own_prefix, self.tokens.prefix, self.tokens.context
        queries, keys, values = (self._group(x[:, own:]) for x in (q, k, v))
        mask = self.plan.mask
        if self.sees_prefix:
            keys, values = (
                self._with_prefix(share_first(x, own, prefix, axis), grouped) for x, grouped in ((k, keys), (v, values))
            )
            mask = None if mask is None else F.pad(mask, (prefix, 0), value=True)
        out = self._attend(queries, keys, values, None if mask is None else mask.to(q.device), q.shape[0])
        patches = self.plan.scatter(out.reshape(q.shape[0], -1, q.shape[2] * q.shape[3]))
        patches = patches.unflatten(2, q.shape[2:])
        if not prefix:
            return patches
        first = share_first(q, own, prefix, axis).transpose(1, 2)
        seen = attend_everywhere(first, k.transpose(1, 2), v.transpose(1, 2), axis).transpose(1, 2)
        return torch.cat([seen[:, :own], patches], 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, images: int) -> Tensor:
        """[B * G, L, h, K] each, mask [G, L, L] -> [B * G, L, h, K]."""
        if self.relative_position is not None:
            bias = relative_bias(self.relative_position, self.sides)
            return biased_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, mask).transpose(1, 2)
        if mask is not None:
            mask = mask[:, None].repeat(images, 1, 1, 1)
        return softmax_attention(q, k, v, mask)

    def _group(self, x: Tensor) -> Tensor:
        """[B, N, h, K] -> [B * G, L, h, K]."""
        b, _, h, k = x.shape
        return self.plan.gather(x.flatten(2)).view(b * self.plan.count, self.plan.length, h, k)

    def _with_prefix(self, prefix: Tensor, grouped: Tensor) -> Tensor:
        """[B, P, h, K] before each group of the image: [B * G, P + L, h, K]."""
        each = prefix[:, None].expand(-1, self.plan.count, -1, -1, -1).flatten(0, 1)
        return torch.cat([each, grouped], 1)


class LinearAttention(nn.Module):
    """Attention through feature maps (model.kernels), with an optional depth-wise convolution of v over the map.

    Over a context axis only the sums of keys and values travel, and, with a convolution, v.
    """

    def __init__(self, build: Build, kind: str) -> None:
        super().__init__()
        config, self.tokens, self.kernels = build.config, build.tokens, build.kernels
        self.feature_map, size, k = config.feature_map or "elu", config.linear_conv or 0, build.here.head_dim
        self.conv_weight: nn.Parameter | None = None
        self.conv_bias: nn.Parameter | None = None
        if size:  # shared by the heads, of which each tensor rank has its own: partial
            std, zeros = Init(kind="normal", scales=(1 / size,)), Init(kind="constant", scales=(0.0,))
            weight = TensorLayout(shape=(k, size, size))
            self.conv_weight = make_parameter(ParameterInfo(layout=weight, init=std, partial_over_tensor=True))
            bias = TensorLayout(shape=(k,))
            self.conv_bias = make_parameter(ParameterInfo(layout=bias, init=zeros, partial_over_tensor=True))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Mixer."""
        axis = self.tokens.context
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))

        def reduce(sums: Tensor) -> None:
            comm.all_reduce(sums, axis)

        over_ranks = reduce if axis.size > 1 else None
        out = self.kernels.linear_attention(q, k, v, self.feature_map, DENOMINATOR, reduce=over_ranks)
        if self.conv_weight is not None:
            out = out + self._conv(v)
        return out.transpose(1, 2)

    def _conv(self, v: Tensor) -> Tensor:
        """[B, h, S, K] -> the same: zero for prefix tokens."""
        t = self.tokens
        assert self.conv_weight is not None
        patches = v[:, :, t.own_prefix :]
        if t.context.size > 1:  # every rank's rows, in their place
            patches = sum_over(F.pad(patches, (0, 0, t.first * t.cols, (t.rows - t.stop) * t.cols)), t.context)
        weight = self.conv_weight.clone()  # not a view of it, which autograd would keep (parallel.sharding.gather)
        y = depthwise_conv(patches, weight, self.conv_bias, (t.rows, t.cols))
        return F.pad(y[:, :, t.first * t.cols : t.stop * t.cols], (0, 0, t.own_prefix, 0))


MIXERS: dict[str, type[FullAttention] | type[GroupedAttention] | type[LinearAttention]] = {
    "full": FullAttention,
    "causal": FullAttention,
    "window": GroupedAttention,
    "shifted_window": GroupedAttention,
    "grid": GroupedAttention,
    "global_tokens": GroupedAttention,
    "linear": LinearAttention,
}


def rotary_table(tokens: Tokens, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, K] of this rank's tokens (Su et al. 2021; two axes as in DINOv3, Siméoni et al. 2025).

    Coordinates run from -1 to 1 over the map, whatever its size: a larger image has its positions rescaled. A quarter
    of the features turns with the row, the next with the column, each at K/4 periods up to `base`; then again, as the
    other half of each rotated pair. Prefix tokens are not rotated.
    """
    periods = base ** (torch.arange(head_dim // 4, dtype=torch.float64) * 4 / head_dim)
    rows = 2 * (torch.arange(tokens.first, tokens.stop, dtype=torch.float64) + 0.5) / tokens.rows - 1
    cols = 2 * (torch.arange(tokens.cols, dtype=torch.float64) + 0.5) / tokens.cols - 1
    by_row, by_col = (2 * math.pi * place[:, None] / periods for place in (rows, cols))
    angles = torch.cat([by_row.repeat_interleave(tokens.cols, 0), by_col.repeat(len(rows), 1)], 1).repeat(1, 2)
    angles = F.pad(angles, (0, 0, tokens.own_prefix, 0))
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=256)
def _rotary_table_of(rows: int, cols: int, prefix: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """That of an image of so many patches, whole."""
    whole = Tokens(rows=rows, cols=cols, prefix=prefix, rows_of_ranks=((0, rows),), context=single_axis("context"))
    with torch.inference_mode(False):  # they are kept, and may be trained with later
        return rotary_table(whole, head_dim, base)


def packed_rotary_table(packing: Packing, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [R, K] of images of several sizes, each over its own map; 0 for filling."""
    each = [_rotary_table_of(*sides, packing.prefix, head_dim, base) for sides in packing.maps]
    cos, sin = (F.pad(torch.cat(tables), (0, 0, 0, packing.filling)) for tables in zip(*each, strict=True))
    return cos.to(packing.device), sin.to(packing.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, S, h, K] by the table [S, K]."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def _mix_packed(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention within each image: [1, R, h, K] each -> [R, h, K]."""
    return segment_attention(q[0], k[0], v[0], packing.lengths, packing.lengths)


class Attention(WithTables, Tapped):
    """Attention of one kind on this rank's heads, with optional QK normalisation and rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, build: Build, kind: str, regions: Regions | None = None) -> None:
        super().__init__()
        self.regions = regions or Regions()
        self.site = Site.of(build, kind)
        here, self.tokens = build.here, build.tokens.count
        self.heads, self.head_dim = build.part(here.heads), here.head_dim
        self.mixer: Mixer = MIXERS[kind](build, kind)
        self.rotates = build.config.position == "rope_2d"
        if self.rotates:
            self.base = build.config.rope_base or 100.0
            cos, sin = rotary_table(build.tokens, self.head_dim, self.base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.normalise = QkNorm(build)
        self.q_norm, self.k_norm = (qk_norm(build) if build.config.qk_norm else None for _ in range(2))

    def forward(self, qkv: Tensor, packing: Packing | None = None) -> Tensor:
        """[R, 3 * h * K], this rank's heads of q, then of k, then of v -> [R, h * K]."""
        q, k, v = self.regions("qk_norm", self._heads, qkv, packing)
        if self.tap is not None:
            q, k, v = self.regions("tap", self.tap, q, k, v)
        return self.regions("attention", self._mix, q, k, v, packing)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
        """[B, S, h, K] each -> [R, h * K]."""
        mixer: Mixer = self.mixer if packing is None else partial(_mix_packed, packing)
        return mixer(q, k, v).reshape(-1, self.heads * self.head_dim)

    def _heads(self, qkv: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        """[R, 3 * h * K] -> q, k, v [B, S, h, K], normalised and rotated; packed, [1, R, h, K]."""
        parts: Iterable[Tensor] = qkv.unflatten(1, (3, -1)).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            parts = self.normalise(qkv, self.q_norm, self.k_norm)
        tokens = self.tokens if packing is None else packing.rows
        q, k, v = (part.reshape(-1, tokens, self.heads, self.head_dim) for part in parts)
        if self.rotates:
            if packing is None:
                cos, sin = self.cos.to(q.device), self.sin.to(q.device)
            else:
                cos, sin = packing.once(packed_rotary_table, self.head_dim, self.base)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v
