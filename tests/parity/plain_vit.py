"""A Vision Transformer written a second time, in plain PyTorch and nothing else, to hold ours against.

It shares no code with the engine: convolution for the patch embedding, attention with the softmax written out,
LayerNorm from its definition, torch's own losses, clipping and AdamW on unflattened parameters. Its weights are a
dictionary with the engine's (logical) names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the weights do not tell."""

    patch: int
    heads: int
    depth: int
    block: str
    position: str
    pool: str
    gelu: str


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the last dim."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6) * weight
    return y if bias is None else y + bias


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, K] each."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def self_attention(qkv: Tensor, heads: int, q_scale: Tensor | None, k_scale: Tensor | None) -> Tensor:
    """[B, S, 3D] -> [B, S, D]."""
    b, s, _ = qkv.shape
    q, k, v = (part.view(b, s, heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    if q_scale is not None and k_scale is not None:
        q, k = norm(q, q_scale), norm(k, k_scale)
    return softmax_attention(q, k, v).transpose(1, 2).reshape(b, s, -1)


def embed(w: Weights, images: Tensor, shape: Shape) -> Tensor:
    """[B, C, H, W] -> [B, S, D]."""
    b, c = images.shape[:2]
    kernel = w["embed.weight"].view(-1, c, shape.patch, shape.patch)
    patches = F.conv2d(images, kernel, w["embed.bias"], stride=shape.patch)
    grid = patches.shape[-1]
    x = patches.flatten(2).transpose(1, 2)
    prefix = []
    if shape.position == "learned_2d":
        x = x + torch.stack([w["embed.pos_row"][i // grid] + w["embed.pos_col"][i % grid] for i in range(grid * grid)])
    elif shape.position == "learned_1d":
        x = x + w["embed.pos"][-grid * grid :]
    else:
        x = x + _sincos(grid, x.shape[-1])
    if "embed.cls" in w:
        prefix.append(w["embed.cls"] + (w["embed.pos"][:1] if shape.position == "learned_1d" else 0))
    if "embed.registers" in w:
        prefix.append(w["embed.registers"])
    return torch.cat([*(p.expand(b, -1, -1) for p in prefix), x], 1)


def _sincos(grid: int, width: int) -> Tensor:
    table = torch.empty(grid * grid, width)
    for row in range(grid):
        for column in range(grid):
            for i in range(width // 4):
                frequency = 10_000.0 ** (-i / (width // 4))
                place = table[row * grid + column]
                place[i], place[i + width // 4] = math.sin(column * frequency), math.cos(column * frequency)
                place[i + width // 2], place[i + 3 * width // 4] = math.sin(row * frequency), math.cos(row * frequency)
    return table


def block(w: Weights, x: Tensor, shape: Shape) -> Tensor:
    """One transformer block; `w` has the block's own names."""
    q_norm, k_norm = w.get("core.q_norm.weight"), w.get("core.k_norm.weight")
    if shape.block == "parallel":
        d = x.shape[-1]
        y = norm(x, w["norm.weight"], w.get("norm.bias"))
        attention_in, mlp_in = w["in_proj.weight"][: 3 * d], w["in_proj.weight"][3 * d :]
        bias = w.get("in_proj.bias")
        qkv_bias, mlp_bias = (bias[: 3 * d], bias[3 * d :]) if bias is not None else (None, w["fc1_bias"])
        attended = self_attention(F.linear(y, attention_in, qkv_bias), shape.heads, q_norm, k_norm)
        hidden = F.gelu(F.linear(y, mlp_in, mlp_bias), approximate=shape.gelu)
        out = w["out_proj.weight"]
        return x + attended @ out[:, :d].T + hidden @ out[:, d:].T + w["out_proj.bias"]
    y = norm(x, w["norm1.weight"], w.get("norm1.bias"))
    qkv = F.linear(y, w["attn.qkv.weight"], w.get("attn.qkv.bias"))
    attended = self_attention(qkv, shape.heads, w.get("attn.core.q_norm.weight"), w.get("attn.core.k_norm.weight"))
    x = x + F.linear(attended, w["attn.proj.weight"], w["attn.proj.bias"])
    return x + mlp(w, "mlp.", norm(x, w["norm2.weight"], w.get("norm2.bias")), shape)


def mlp(w: Weights, prefix: str, x: Tensor, shape: Shape) -> Tensor:
    """fc1, GELU, fc2."""
    hidden = F.gelu(F.linear(x, w[f"{prefix}fc1.weight"], w[f"{prefix}fc1.bias"]), approximate=shape.gelu)
    return F.linear(hidden, w[f"{prefix}fc2.weight"], w[f"{prefix}fc2.bias"])


def attention_pool(w: Weights, x: Tensor, shape: Shape) -> Tensor:
    """[B, S, D] -> [B, D]."""
    b, _, d = x.shape
    q = F.linear(w["head.pool.probe"], w["head.pool.q.weight"], w["head.pool.q.bias"]).expand(b, 1, d)
    k, v = F.linear(x, w["head.pool.kv.weight"], w["head.pool.kv.bias"]).chunk(2, -1)
    q, k, v = (t.reshape(b, -1, shape.heads, d // shape.heads).transpose(1, 2) for t in (q, k, v))
    pooled = softmax_attention(q, k, v).transpose(1, 2).reshape(b, d)
    y = F.linear(pooled, w["head.pool.proj.weight"], w["head.pool.proj.bias"])
    return y + mlp(w, "head.pool.mlp.", norm(y, w["head.pool.norm.weight"], w["head.pool.norm.bias"]), shape)


def logits(w: Weights, images: Tensor, shape: Shape) -> Tensor:
    """[B, C, H, W] -> [B, classes]."""
    x = embed(w, images, shape)
    for i in range(shape.depth):
        prefix = f"blocks.{i}."
        x = block({name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}, x, shape)
    x = norm(x, w["head.norm.weight"], w.get("head.norm.bias"))
    if shape.pool == "map":
        pooled = attention_pool(w, x, shape)
    elif shape.pool == "cls":
        pooled = x[:, 0]
    else:  # patches only
        pooled = x[:, w["embed.registers"].shape[0] if "embed.registers" in w else 0 :].mean(1)
    return F.linear(pooled, w["head.fc.weight"], w["head.fc.bias"])


def loss_of(scores: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Mean over images."""
    if loss == "softmax":
        return F.cross_entropy(scores, labels)
    targets = F.one_hot(labels, scores.shape[1]).to(scores.dtype)
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
        batches: (images, labels) of each step. rates: learning rate of each step. decays: weight decay by name.
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
