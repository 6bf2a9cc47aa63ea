"""How tokens of an image relate to each other, a student's beside a teacher's: attention maps (Wang et al. 2020,
MiniLM), relations of queries, of keys or of values (Wang et al. 2021, MiniLMv2), Gram matrices of patches (Simeoni et
al. 2025, DINOv3).

All are a function of products of one set of rows with another. Products are made a tile at a time, of some images and
some of their queries; each is turned into its derivative in place, and that into gradients, so nothing of N x N is kept
for backward, which has only to multiply. Four products of a tile in all, where autograd takes as many and keeps maps.

Legend: B images, Q queries that this rank has, N keys, H heads, K and L the head dims of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 1 << 20
"""The most numbers of a tile: 4 MiB in fp32. At least one query with all keys of all heads of an image."""

Difference = Callable[[Tensor, Tensor], Tensor]
"""Products of student and teacher [b, H, q, N] -> losses [b]; the student's become their own derivative, in place."""


def map_divergence(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, queries: int, heads: int, *, tile: int = TILE
) -> Tensor:
    """KL divergence of attention maps, softmax(q k' / sqrt(head dim)), from the teacher's, head by head: in nats, a
    mean over queries and heads.

    Args:
        q: [B, Q, H, K], of some tokens and some heads. k: [B, N, H, K], of all tokens. teacher_q, teacher_k: the same
            with L. queries, heads: of which this is the mean, those of all ranks. tile: see TILE.

    Returns:
        [B], this rank's share, of fp32 at least.

    Raises:
        ValueError: numbers of heads or tokens differ.
    """
    _check(q, k, teacher_q, teacher_k)
    scales = q.shape[3] ** -0.5, teacher_q.shape[3] ** -0.5
    return _related(q, k, teacher_q, teacher_k, _divergence, scales, queries * heads, tile)


def relation_divergence(
    x: Tensor, teacher: Tensor, relations: int, *, keys: Tensor | None = None, teacher_keys: Tensor | None = None,
    queries: int | None = None, tile: int = TILE,
) -> Tensor:  # fmt: skip
    """The same of softmax(x x' / sqrt(head dim)), x the queries, the keys or the values of an attention layer.

    Args:
        x: [B, Q, r, K], this rank's relation heads (`resplit_heads`). teacher: [B, Q, r, L]. relations: r of all ranks.
            keys, teacher_keys: [B, N, r, ...] of all tokens (`tokens_of_all`), if x is of some. queries: how many there
            are on all ranks then.
    """
    keys, teacher_keys = (x if keys is None else keys), (teacher if teacher_keys is None else teacher_keys)
    return map_divergence(x, keys, teacher, teacher_keys, queries or keys.shape[1], relations, tile=tile)


def gram_difference(
    x: Tensor, teacher: Tensor, *, keys: Tensor | None = None, teacher_keys: Tensor | None = None, tile: int = TILE
) -> Tensor:
    """Mean square of what the patches' cosines, each with each, differ by: the Gram loss of DINOv3.

    Args:
        x: [B, Q, D], patches. teacher: [B, Q, E], of the same patches. keys, teacher_keys: [B, N, ...], all patches, if
            these are some (`tokens_of_all`).

    Returns:
        [B], this rank's share, of fp32 at least.

    Raises:
        ValueError: numbers of patches differ.
    """
    keys, teacher_keys = (x if keys is None else keys), (teacher if teacher_keys is None else teacher_keys)
    x, keys, teacher, teacher_keys = (
        F.normalize(of.to(_wide(of)), dim=2)[:, :, None] for of in (x, keys, teacher, teacher_keys)
    )
    _check(x, keys, teacher, teacher_keys)
    return _related(x, keys, teacher, teacher_keys, _square, (1.0, 1.0), keys.shape[1] ** 2, tile)


def _check(a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor) -> None:
    for what, own, theirs in (("queries", a, teacher_a), ("keys", b, teacher_b)):
        if own.shape[:2] != theirs.shape[:2]:
            raise ValueError(
                f"the student has {own.shape[1]} {what} of {own.shape[0]} images, the teacher {theirs.shape[1]} of "
                f"{theirs.shape[0]}: resample one of both, and leave out the prefix tokens that one has alone"
            )
        if own.shape[2] != theirs.shape[2]:
            raise ValueError(
                f"the student has {own.shape[2]} heads of {what} here, the teacher {theirs.shape[2]}: maps are matched "
                "head by head; split both into as many relation heads (resplit_heads)"
            )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _related(
    a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, difference: Difference, scales: tuple[float, float],
    count: int, tile: int,
) -> Tensor:  # fmt: skip
    loss: Tensor = _Related.apply(a, b, teacher_a.detach(), teacher_b.detach(), difference, scales, 1 / count, tile)
    return loss


class _Related(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, difference: Difference,
        scales: tuple[float, float], weight: float, tile: int,
    ) -> Tensor:  # fmt: skip
        wide, wanted = _wide(a), any(ctx.needs_input_grad[:2])
        losses = a.new_zeros(a.shape[0], dtype=wide)
        grad_a, grad_b = (torch.zeros(x.shape, dtype=wide, device=x.device) if wanted else None for x in (a, b))
        for images, rows in _tiles(a.shape[0], a.shape[1], b.shape[1] * b.shape[2], tile):
            own, keys = _heads(a[images, rows], wide, scales[0]), _heads(b[images], wide)
            other = _heads(teacher_a[images, rows], wide, scales[1]) @ _heads(teacher_b[images], wide).mT
            slope = own @ keys.mT
            losses[images] += difference(slope, other) * weight
            if grad_a is not None and grad_b is not None:
                del other
                grad_a[images, rows] = (slope @ keys).transpose(1, 2).mul_(weight * scales[0])
                grad_b[images] += (slope.mT @ own).transpose(1, 2).mul_(weight)
        if grad_a is not None and grad_b is not None:
            ctx.save_for_backward(grad_a, grad_b)
        ctx.types = a.dtype, b.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_image = grads[0][:, None, None, None]
        own = [(of_image * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)]
        return (*own, None, None, None, None, None, None)


def _tiles(images: int, queries: int, keys: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """(images, queries) whose products with all keys of all heads are at most a tile; `keys`: N x H."""
    keys = max(1, keys)  # a rank may have no heads
    rows = max(1, min(queries, tile // keys))
    some = max(1, tile // (rows * keys)) if rows == queries else 1
    for first in range(0, images, some):
        for start in range(0, queries, rows):
            yield slice(first, min(first + some, images)), slice(start, min(start + rows, queries))


def _heads(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """[b, S, H, K] -> [b, H, S, K], times `scale`."""
    x = x.transpose(1, 2).to(dtype)
    return x if scale == 1 else x * scale


def _divergence(own: Tensor, other: Tensor) -> Tensor:
    """KL of softmax(own) from softmax(other) over the last dim, whose derivative is their difference."""
    for x in (own, other):
        x.sub_(x.amax(3, keepdim=True))
        x.sub_(x.exp().sum(3, keepdim=True).log_())
    likely = other.exp()
    losses = other.sub_(own).mul_(likely).sum((1, 2, 3))
    own.exp_().sub_(likely)
    return losses


def _square(own: Tensor, other: Tensor) -> Tensor:
    """Squares of what they differ by."""
    own.sub_(other)
    losses = torch.linalg.vector_norm(own, dim=(1, 2, 3)).square()
    own.mul_(2)
    return losses
