"""Relations of queries, keys and values, features of blocks, pooled ones: in plain PyTorch, each as its paper has it.

Legend: B images, S tokens, P patches, D width, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model import VisionTransformer
from model.taps import Tapped

Attended = dict[int, tuple[Tensor, Tensor, Tensor]]


@contextmanager
def attended(model: VisionTransformer) -> Iterator[Attended]:
    """q, k and v of each block, [B, S, H, K], once the model has run."""
    found = Attended()

    def keep(block: int) -> Any:
        def tap(*qkv: Tensor) -> tuple[Tensor, ...]:
            found[block] = qkv  # type: ignore[assignment]
            return qkv

        return tap

    parts = [
        next(part for part in model.get_submodule(f"blocks.{i}").modules() if isinstance(part, Tapped))
        for i in range(model.sizes.depth)
    ]
    for block, part in enumerate(parts):
        part.tap = keep(block)
    yield found
    for part in parts:
        part.tap = None


@contextmanager
def rows_of(model: VisionTransformer) -> Iterator[dict[int, Tensor]]:
    """What each block gives out for patches, [B, P, D], once the model has run; and, as that of one more, what a
    projection for the head does."""
    found, depth, prefix = dict[int, Tensor](), model.sizes.depth, model.sizes.prefix

    def keep(block: int) -> Any:
        def after(_: Any, args: tuple[Any, ...], out: Tensor) -> None:
            found[block] = out.unflatten(0, (args[1].size, -1))[:, prefix:]

        return after

    names = [*(f"blocks.{i}" for i in range(depth)), *filter(None, [model.sizes.projection])]
    hooks = [model.get_submodule(name).register_forward_hook(keep(i)) for i, name in enumerate(names)]
    yield found
    for hook in hooks:
        hook.remove()


@contextmanager
def pooled(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """What the classifier is given, [B, D], once the model has run."""
    found = list[Tensor]()
    hook = model.get_submodule("head.fc").register_forward_pre_hook(lambda _, args: found.append(args[0]))
    yield found
    hook.remove()


def tokens(x: Tensor, model: VisionTransformer, classes: int, maps: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """Class tokens and patches of [B, S, H, K], the map of these as another: [B, S', H, K]."""
    there, here = maps
    patches = x[:, model.sizes.prefix :]
    if there != here:
        grid = patches.flatten(2).transpose(1, 2).unflatten(2, there)
        grid = F.interpolate(grid, here, mode="bilinear", antialias=True)
        patches = grid.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
    return torch.cat([x[:, :classes], patches], 1)


def relation(a: Tensor, b: Tensor) -> Tensor:
    """log softmax(a b' / sqrt(K)) of [B, S, H, K] twice: [B, H, S, S]."""
    a, b = a.transpose(1, 2), b.transpose(1, 2)
    return (a @ b.mT / a.shape[3] ** 0.5).log_softmax(3)


def divergence(kind: str, own: tuple[Tensor, ...], theirs: tuple[Tensor, ...], heads: int) -> Tensor:
    """KL from the teacher's of maps, or of relations within queries, keys or values cut into so many heads: the mean
    over images, heads and queries."""
    if kind == "maps":
        p, q = (relation(of[0], of[1]) for of in (own, theirs))
    else:
        which = ("queries", "keys", "values").index(kind)
        p, q = (relation(x, x) for x in (of[which].flatten(2).unflatten(2, (heads, -1)) for of in (own, theirs)))
    return (q.exp() * (q - p)).sum(3).mean()


def between(kind: str, own: Tensor, theirs: Tensor) -> Tensor:
    """RKD's Huber loss of distances over their mean, of pairs, or of cosines of angles, of triplets: [B, D], [B, E]."""
    if kind == "distances":
        apart = ~torch.eye(len(own), dtype=torch.bool)
        a, b = ((x[:, None] - x)[apart].norm(dim=1) for x in (own, theirs))
        return F.smooth_l1_loss(a / a.mean(), b / b.mean())
    each = []
    for vertex in range(len(own)):
        others = [place for place in range(len(own)) if place != vertex]
        a, b = (F.normalize(x[others] - x[vertex], dim=1) for x in (own, theirs))
        apart = ~torch.eye(len(others), dtype=torch.bool)
        each.append(F.smooth_l1_loss((a @ a.T)[apart], (b @ b.T)[apart]))
    return torch.stack(each).mean()
