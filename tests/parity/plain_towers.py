"""Two towers and where they meet, written a second time in plain PyTorch, as `plain_vit` is, whose blocks both share.

Its weights are a dictionary with the engine's (logical) names. Legend: B pairs, S tokens of a text, D width, E
embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import plain_vit
from tests.parity.plain_vit import Shape, Site, Weights, under


@dataclass(frozen=True)
class TextShape:
    """What the weights do not tell."""

    form: Shape  # of blocks, norms and the attention pool; its kinds are those of the blocks
    pool: str  # eos, last, mean, map
    end_token: int


def project(w: Weights, y: Tensor, gelu: str) -> Tensor:
    """One matrix, two, or none, as the weights say: [B, D] -> [B, E]."""
    if "head.fc.weight" in w:
        return F.linear(y, w["head.fc.weight"], w.get("head.fc.bias"))
    if "head.project.fc1.weight" in w:
        return plain_vit.mlp(w, "head.project.", y, replace(_ANY, gelu=gelu))
    return y


_ANY = Shape(patch=1, heads=1, depth=1, block="sequential", position="none", pool="gap", gelu="erf")


def encode_image(w: Weights, images: Tensor, shape: Shape) -> Tensor:
    """[B, C, H, W] -> [B, E]."""
    own = {name: value for name, value in w.items() if not name.startswith("head.project.")}
    if "head.fc.weight" in w or len(own) == len(w):
        return plain_vit.logits(w, images, shape)
    return project(w, plain_vit.logits(own, images, shape), shape.gelu)


def encode_text(w: Weights, texts: Tensor, shape: TextShape) -> Tensor:
    """[B, S] -> [B, E], text by text."""
    form, length = shape.form, texts.shape[1]
    x = torch.stack([torch.stack([w["embed.token.weight"][int(token)] for token in text]) for text in texts])
    x = x + w["embed.pos"]
    (stage,) = form.all_stages()
    for number, kind in enumerate(stage.kinds):
        x = plain_vit.block(under(w, f"blocks.{number}."), x, form, Site(kind, stage, (1, length), 0))
    x = plain_vit.norm(w, "head.norm.", x, form)
    pooled = []
    for tokens, text in zip(x, texts.tolist(), strict=True):
        end = text.index(shape.end_token) if shape.end_token in text else length - 1
        if shape.pool == "map":
            pooled.append(plain_vit.attention_pool(w, tokens[None, : end + 1], form)[0])
        else:
            pooled.append({"eos": tokens[end], "last": tokens[-1], "mean": tokens[: end + 1].mean(0)}[shape.pool])
    return project(w, torch.stack(pooled), form.gelu)


def pair(left: Tensor, right: Tensor, w: Weights, most: float = 100.0) -> tuple[Tensor, ...]:
    """Embeddings divided by their lengths, scale, bias."""
    scale = torch.exp(w["pair.logit_scale"][0]).clamp(max=most)
    bias = w["pair.logit_bias"][0] if "pair.logit_bias" in w else torch.zeros((), dtype=left.dtype)
    unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in (left, right)]
    return unit[0], unit[1], scale, bias
