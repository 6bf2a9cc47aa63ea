"""A Vision Transformer written a second time, in plain PyTorch and nothing else, to hold ours against.

It shares no code with the engine: convolution for the patch embedding, attention with the softmax and an S x S mask
written out, norms and rotations from their definitions, loops over coordinates, torch's own losses, clipping and AdamW
on unflattened parameters. Its weights are a dictionary with the engine's (logical) names.

Legend: B images, P patch side, gh x gw grid of patches, N = gh * gw, S = prefix + N tokens, D (here also C) width,
H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Grid = tuple[int, int]
PREFIX = ("embed.cls", "embed.registers", "embed.global_tokens")  # the order of the tokens before the patches


@dataclass(frozen=True)
class StageShape:
    """A run of blocks at one resolution."""

    depth: int
    heads: int
    kinds: tuple[str, ...]  # of each block: full, causal, window, shifted_window, grid, global_tokens, linear
    window: int = 0
    grid_size: int = 0


@dataclass(frozen=True)
class Shape:
    """What the weights do not tell. An isotropic model may leave `stages` empty: it is one stage of depth, heads,
    kinds, window and grid_size; a pyramid's stages have their own.
    """

    patch: int
    heads: int
    depth: int
    block: str  # parallel, sequential
    position: str  # learned_2d, learned_1d, sincos_2d, rope_2d, none
    pool: str  # map, cls, gap, cls_gap
    gelu: str  # erf, tanh, quick
    image: tuple[int, int] | None = None  # rows and columns of pixels; None: those of the images that come
    norm: str = "layernorm"  # or rmsnorm
    mlp: str = "gelu"  # or swiglu
    rope_base: float = 100.0
    kinds: tuple[str, ...] = ()  # empty: all full
    window: int = 0
    grid_size: int = 0
    feature_map: str = "elu"  # or relu, focused
    power: int = 3
    norm_after_pool: bool = False
    stages: tuple[StageShape, ...] = ()
    eps: float = 1e-6  # of the norms

    def all_stages(self) -> tuple[StageShape, ...]:
        """One of an isotropic model, several of a pyramid."""
        kinds = self.kinds or ("full",) * self.depth
        stages = self.stages or (StageShape(self.depth, self.heads, kinds, self.window, self.grid_size),)
        assert all(len(stage.kinds) == stage.depth for stage in stages)
        return stages


@dataclass(frozen=True)
class Site:
    """Where a block attends."""

    kind: str
    stage: StageShape
    grid: Grid
    prefix: int  # tokens before the patches

    def neighbourhood(self, patch: int) -> Grid:
        """Patches with the same one see each other."""
        row, column = divmod(patch, self.grid[1])
        window = self.stage.window
        if self.kind == "grid":
            stride_row, stride_column = (math.ceil(side / self.stage.grid_size) for side in self.grid)
            return row % stride_row, column % stride_column
        if self.kind == "shifted_window":
            down, right = (window // 2 if side > window else 0 for side in self.grid)  # not where one window covers it
            return (row - down) // window, (column - right) // window  # floors, also below zero
        assert self.kind in ("window", "global_tokens")
        return row // window, column // window

    def sees(self, token: int, other: int) -> bool:
        """Whether a token attends to another."""
        if self.kind == "causal":
            return other <= token
        if self.kind == "full" or token < self.prefix:
            return True
        if other < self.prefix:
            return self.kind == "global_tokens"
        return self.neighbourhood(token - self.prefix) == self.neighbourhood(other - self.prefix)

    def mask(self) -> Tensor:
        """[S, S]: the row's token attends to the column's."""
        tokens = range(self.prefix + self.grid[0] * self.grid[1])
        return torch.tensor([[self.sees(i, j) for j in tokens] for i in tokens])

    def relative(self, table: Tensor) -> Tensor:
        """Of [H, offsets], what is added to each pair of patches that may share a window: [H, S, S]."""
        rows, columns = self.grid
        high, wide = min(self.stage.window, rows), min(self.stage.window, columns)
        entries = torch.full((rows, columns, rows, columns), table.shape[1])
        for row, column, other_row, other_column in product(range(rows), range(columns), range(rows), range(columns)):
            down, right = row - other_row, column - other_column
            if abs(down) < high and abs(right) < wide:
                entry = (down + high - 1) * (2 * wide - 1) + right + wide - 1
                entries[row, column, other_row, other_column] = entry
        by_pair = F.pad(table, (0, 1))[:, entries.flatten()].view(-1, rows * columns, rows * columns)
        return F.pad(by_pair, (self.prefix, 0, self.prefix, 0))


def under(w: Weights, prefix: str) -> Weights:
    """Those whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dim."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dim."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def norm(w: Weights, prefix: str, x: Tensor, shape: Shape) -> Tensor:
    """The model's kind of norm."""
    if shape.norm == "rmsnorm":
        assert f"{prefix}bias" not in w
        return rmsnorm(x, w[f"{prefix}weight"], shape.eps)
    return layernorm(x, w[f"{prefix}weight"], w.get(f"{prefix}bias"), shape.eps)


def with_keys(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """A bias of [q, k, v, ...]; keys that have none get zeros."""
    if bias is None or len(bias) == len(weight):
        return bias
    d = weight.shape[1]
    assert len(bias) == len(weight) - d
    return torch.cat([bias[:d], torch.zeros(d).to(bias), bias[d:]])


def rotate(x: Tensor, site: Site, base: float) -> Tensor:
    """Rotary positions of the patches among [B, H, S, K]; the prefix stays as it is."""
    rows, columns = site.grid
    k = x.shape[-1]
    angles = torch.empty(rows * columns, k, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            y, x_ = 2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1
            periods = [base ** (2 * i / (k / 2)) for i in range(k // 4)]
            once = [2 * math.pi * y / period for period in periods] + [2 * math.pi * x_ / period for period in periods]
            angles[row * columns + column] = torch.tensor(once + once, dtype=torch.float64)
    prefix, patches = x[:, :, : site.prefix], x[:, :, site.prefix :]
    a, b = patches.chunk(2, -1)
    rotated = patches * angles.cos().to(x) + torch.cat([-b, a], -1) * angles.sin().to(x)
    return torch.cat([prefix, rotated], 2)


def over_heads(w: Weights, prefix: str, x: Tensor, shape: Shape) -> Tensor:
    """The norm of [B, H, S, K] over each head, or over all where its weight has as many entries."""
    b, heads, s, k = x.shape
    if len(w[f"{prefix}weight"]) == k:
        return norm(w, prefix, x, shape)
    return norm(w, prefix, x.transpose(1, 2).reshape(b, s, -1), shape).view(b, s, heads, k).transpose(1, 2)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """[B, H, S, K] each."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def feature_map(x: Tensor, shape: Shape) -> Tensor:
    """phi of linear attention, over the last dim."""
    if shape.feature_map == "elu":
        return F.elu(x) + 1
    u = F.relu(x)
    if shape.feature_map == "relu":
        return u
    nothing = (u == 0).all(-1, keepdim=True)  # has no direction: 0, also in its gradient
    u = torch.where(nothing, 1.0, u)
    sharp = u**shape.power
    focused = u.norm(dim=-1, keepdim=True) * sharp / sharp.norm(dim=-1, keepdim=True)
    return torch.where(nothing, 0.0, focused)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """[B, H, S, K] each; in the quadratic order, which is the same sum."""
    weights = feature_map(q, shape) @ feature_map(k, shape).transpose(-2, -1)
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def convolve(v: Tensor, weight: Tensor, bias: Tensor, site: Site) -> Tensor:
    """A depth-wise convolution of each head's patches [B, H, S, K] on their map, zero for the prefix."""
    b, h, _, k = v.shape
    maps = v[:, :, site.prefix :].transpose(2, 3).reshape(b * h, k, *site.grid)
    y = F.conv2d(maps, weight[:, None], bias, padding=weight.shape[-1] // 2, groups=k)
    return F.pad(y.view(b, h, k, -1).transpose(2, 3), (0, 0, site.prefix, 0))


def self_attention(core: Weights, qkv: Tensor, shape: Shape, site: Site) -> Tensor:
    """[B, S, 3D] -> [B, S, D]."""
    b, s, _ = qkv.shape
    q, k, v = (part.view(b, s, site.stage.heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    if "q_norm.weight" in core:
        q, k = (over_heads(core, f"{name}.", x, shape) for name, x in (("q_norm", q), ("k_norm", k)))
    if shape.position == "rope_2d":
        q, k = rotate(q, site, shape.rope_base), rotate(k, site, shape.rope_base)
    if site.kind == "linear":
        y = linear_attention(q, k, v, shape)
        if "mixer.conv_weight" in core:
            y = y + convolve(v, core["mixer.conv_weight"], core["mixer.conv_bias"], site)
    else:
        table = core.get("mixer.relative_position")
        y = softmax_attention(q, k, v, site.mask(), site.relative(table) if table is not None else None)
    return y.transpose(1, 2).reshape(b, s, -1)


def embed(w: Weights, images: Tensor, shape: Shape) -> tuple[Tensor, Grid]:
    """[B, C, H, W] -> [B, S, D] and the grid."""
    b, c, height, width = images.shape
    assert shape.image in (None, (height, width))
    images = F.pad(images, (0, -width % shape.patch, 0, -height % shape.patch))
    kernel = w["embed.weight"].view(-1, c, shape.patch, shape.patch)
    patches = F.conv2d(images, kernel, w.get("embed.bias"), stride=shape.patch)
    rows, columns = patches.shape[2:]
    x = patches.flatten(2).transpose(1, 2)
    prefix = [w[name] for name in PREFIX if name in w]
    if shape.position == "learned_2d":
        row, column = w["embed.pos_row"], w["embed.pos_col"]
        x = x + torch.stack([row[i] + column[j] for i in range(rows) for j in range(columns)])
    elif shape.position == "learned_1d":
        x = x + w["embed.pos"][-rows * columns :]
        if len(w["embed.pos"]) > rows * columns:  # rows of class tokens
            prefix[0] = prefix[0] + w["embed.pos"][: -rows * columns]
    elif shape.position == "sincos_2d":
        x = x + _sincos(rows, columns, x.shape[-1]).to(x)
    else:
        assert shape.position in ("rope_2d", "none")
    x = torch.cat([*(p.expand(b, -1, -1) for p in prefix), x], 1)
    return (norm(w, "embed.norm.", x, shape) if "embed.norm.weight" in w else x), (rows, columns)


def _sincos(rows: int, columns: int, width: int) -> Tensor:
    table = torch.empty(rows * columns, width, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for i in range(width // 4):
                frequency = 10_000.0 ** (-i / (width // 4))
                place = table[row * columns + column]
                place[i], place[i + width // 4] = math.sin(column * frequency), math.cos(column * frequency)
                place[i + width // 2], place[i + 3 * width // 4] = math.sin(row * frequency), math.cos(row * frequency)
    return table


def block(w: Weights, x: Tensor, shape: Shape, site: Site) -> Tensor:
    """One transformer block; `w` has the block's own names."""
    if shape.block == "parallel":
        d = x.shape[-1]
        y = norm(w, "norm.", x, shape)
        attention_in, mlp_in = w["in_proj.weight"][: 3 * d], w["in_proj.weight"][3 * d :]
        bias = with_keys(w.get("in_proj.bias"), w["in_proj.weight"])
        qkv_bias, mlp_bias = (bias[: 3 * d], bias[3 * d :]) if bias is not None else (None, w["fc1_bias"])
        attended = self_attention(under(w, "core."), F.linear(y, attention_in, qkv_bias), shape, site)
        hidden = activate(F.linear(y, mlp_in, mlp_bias), shape)
        out = w["out_proj.weight"]
        return x + w.get("scale", 1.0) * (attended @ out[:, :d].T + hidden @ out[:, d:].T + w["out_proj.bias"])
    bias = with_keys(w.get("attn.qkv.bias"), w["attn.qkv.weight"])
    qkv = F.linear(norm(w, "norm1.", x, shape), w["attn.qkv.weight"], bias)
    attended = self_attention(under(w, "attn.core."), qkv, shape, site)
    x = x + w.get("scale1", 1.0) * F.linear(attended, w["attn.proj.weight"], w["attn.proj.bias"])
    return x + w.get("scale2", 1.0) * mlp(w, "mlp.", norm(w, "norm2.", x, shape), shape)


def activate(hidden: Tensor, shape: Shape) -> Tensor:
    """GELU of [.., M], or SwiGLU of [.., 2M]."""
    if shape.mlp == "swiglu":
        gate, value = hidden.chunk(2, -1)
        return F.silu(gate) * value
    if shape.gelu == "quick":
        return hidden / (1 + torch.exp(-1.702 * hidden))
    return F.gelu(hidden, approximate="tanh" if shape.gelu == "tanh" else "none")


def mlp(w: Weights, prefix: str, x: Tensor, shape: Shape) -> Tensor:
    """fc1, activation, fc2."""
    hidden = activate(F.linear(x, w[f"{prefix}fc1.weight"], w[f"{prefix}fc1.bias"]), shape)
    return F.linear(hidden, w[f"{prefix}fc2.weight"], w[f"{prefix}fc2.bias"])


def merge(w: Weights, x: Tensor, grid: Grid, prefix: int, eps: float = 1e-6) -> tuple[Tensor, Grid]:
    """Patch merging, 2 x 2 into one: [B, S, C] -> [B, S', D'] and the new grid; `w` has the merge's own names."""
    rows, columns = grid
    places = x[:, prefix:].unflatten(1, grid)
    places = F.pad(places, (0, 0, 0, columns % 2, 0, rows % 2))
    half_rows, half_columns = (rows + 1) // 2, (columns + 1) // 2
    merged = []
    for i in range(half_rows):
        for j in range(half_columns):
            four = [(2 * i, 2 * j), (2 * i + 1, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j + 1)]
            merged.append(torch.cat([places[:, row, column] for row, column in four], -1))
    patches = layernorm(torch.stack(merged, 1), w["norm.weight"], w["norm.bias"], eps) @ w["proj.weight"].T
    if prefix:
        patches = torch.cat([x[:, :prefix] @ w["prefix.weight"].T, patches], 1)
    return patches, (half_rows, half_columns)


def attention_pool(w: Weights, x: Tensor, shape: Shape) -> Tensor:
    """[B, S, D] -> [B, D]; its MLP is a GELU one and its norm a LayerNorm in every model."""
    b, _, d = x.shape
    heads = shape.all_stages()[-1].heads
    q = F.linear(w["head.pool.probe"], w["head.pool.q.weight"], w["head.pool.q.bias"]).expand(b, 1, d)
    k, v = F.linear(x, w["head.pool.kv.weight"], w["head.pool.kv.bias"]).chunk(2, -1)
    q, k, v = (t.reshape(b, -1, heads, d // heads).transpose(1, 2) for t in (q, k, v))
    pooled = softmax_attention(q, k, v).transpose(1, 2).reshape(b, d)
    y = F.linear(pooled, w["head.pool.proj.weight"], w["head.pool.proj.bias"])
    normed = layernorm(y, w["head.pool.norm.weight"], w["head.pool.norm.bias"], shape.eps)
    return y + mlp(w, "head.pool.mlp.", normed, replace(shape, mlp="gelu"))


def logits(w: Weights, images: Tensor, shape: Shape) -> Tensor:
    """[B, C, H, W] -> [B, classes], or, without a classifier, the pooled features."""
    x, grid = embed(w, images, shape)
    prefix = sum(len(w[name]) for name in PREFIX if name in w)
    number = 0  # of the block, through all stages
    for j, stage in enumerate(shape.all_stages()):
        if j:
            x, grid = merge(under(w, f"merges.{j - 1}."), x, grid, prefix, shape.eps)
        for kind in stage.kinds:
            x = block(under(w, f"blocks.{number}."), x, shape, Site(kind, stage, grid, prefix))
            number += 1
    if not shape.norm_after_pool:
        x = norm(w, "head.norm.", x, shape)
    pooled = pool(w, x, shape, prefix)
    if shape.norm_after_pool:
        pooled = [norm(w, "head.norm.", one, shape) for one in pooled]
    if "head.fc.weight" in w:
        names = ["head.fc", "head.fc_distill"][: len(pooled)]
        pooled = [F.linear(y, w[f"{n}.weight"], w.get(f"{n}.bias")) for y, n in zip(pooled, names, strict=True)]
    return torch.stack(pooled).mean(0)


def pool(w: Weights, x: Tensor, shape: Shape, prefix: int) -> list[Tensor]:
    """[B, S, D] -> a vector per image, or that of each of two class tokens."""
    patches = x[:, prefix:]
    if shape.pool == "map":
        return [attention_pool(w, x, shape)]
    if shape.pool == "gap":
        return [patches.mean(1)]
    if shape.pool == "cls_gap":
        return [torch.cat([x[:, 0], patches.mean(1)], 1)]
    return [x[:, i] for i in range(len(w["embed.cls"]))]


def loss_of(scores: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Mean over images; targets [B, classes]."""
    if loss == "softmax":
        return F.cross_entropy(scores, targets)
    return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(1).mean()


def train(
    weights: Weights,
    shape: Shape,
    batches: Iterable[tuple[Tensor, Tensor]],
    rates: Iterable[float],
    *,
    loss: str,
    decays: dict[str, float],
    eps: float,
    clip: float,
) -> tuple[list[float], list[float], Weights]:
    """Train `weights` in place; (losses, gradient norms, gradients of the first step before clipping).

    Args:
        batches: (images, targets) of each step. rates: learning rate of each step. decays: weight decay by name.
    """
    for value in weights.values():
        value.requires_grad_(True)
    groups = [{"params": [value], "weight_decay": decays[name]} for name, value in weights.items()]
    optimizer = torch.optim.AdamW(groups, lr=1.0, eps=eps, foreach=False, fused=False)
    losses, norms, first = [], [], {}
    for (images, labels), rate in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        value = loss_of(logits(weights, images, shape), labels, loss)
        value.backward()
        first = first or {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), clip).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(value.item())
    return losses, norms, first
