"""Queries against keys that have no gradient: momentum contrast (He et al. 2020, MoCo; Chen et al. 2021, MoCo v3).

Keys come from an encoder that is a moving average, so they are constants. `momentum` compares a query with the keys of
the whole batch (v3, which calls it for both ways of two views); `queued` with its own key and a queue of earlier ones
(v1 and v2), of which each rank holds a part: what is small goes round, queries, their sums and their gradients.

Legend: n queries of this rank, N of all ranks, k keys of the queue that this rank holds, K of all, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.contrastive.logsums import LogSums, log_shares, log_sum, part_
from parallel.contrastive.pairs import Gradients, agree
from parallel.contrastive.ring import Homeward, Ring
from parallel.contrastive.softmax import info_nce
from parallel.contrastive.tiles import ROWS, Tiles, dot_of_rows, row_dots


def momentum(queries: Tensor, keys: Tensor, scale: Tensor, axis: Axis, *, block: int = ROWS) -> Gradients:
    """Cross entropy of each query's own key among the keys of all ranks, a mean over N. Collective.

    Three products of n x N x E for each rank. Arguments and errors as `info_nce`; keys get no gradient.
    """
    return info_nce(queries, keys, scale, axis, symmetric=False, right_grad=False, block=block)


@torch.no_grad()
def queued(queries: Tensor, keys: Tensor, queue: Tensor, scale: Tensor, axis: Axis, *, block: int = ROWS) -> Gradients:
    """Cross entropy of each query's own key among it and the keys of the queue, a mean over N. Collective.

    Three products of k x N x E for each rank.

    Args:
        queries, keys: [n, E], row i of both a pair; n may differ among ranks. queue: [k, E], this rank's part; k may
            differ. scale: [], 1 / temperature, the same on all ranks. axis: the ranks. block: the most rows and
            columns of a block of logits.

    Raises:
        ValueError: shapes or types do not fit; no rank has a query, or a key of the queue.
    """
    if keys.shape != queries.shape or keys.dtype != queries.dtype:
        raise ValueError(
            f"queries are {queries.dtype} {list(queries.shape)}, their keys {keys.dtype} {list(keys.shape)}: give a "
            "key for each query"
        )
    sizes = agree(queue, queries, scale, axis, paired=False)
    wide = torch.promote_types(queries.dtype, torch.float32)
    queue, queries, keys = (x.detach().to(wide).contiguous() for x in (queue, queries, keys))
    ring, weight = Ring(axis, sizes.right, block), 1 / sum(sizes.right)
    factor = scale.detach().to(wide).reshape(())
    tiles = Tiles(queue, block, ring.spans(queue.shape[1], queue.itemsize)[0].stop, scale)
    own = row_dots(queries, keys).mul_(factor)
    sums = LogSums(_sums(queue, queries, ring, tiles))
    sums.add(slice(None), own[:, None], 1, torch.empty_like(own[:, None]))
    loss = (log_sum(sums.values) - own.double()).sum() * weight
    logs = part_(sums.values)
    grad = _gradients(queue, queries, ring, tiles, logs)
    # the own key's derivative is p - 1, which is what the queue's p add up to, less one: no digits cancel
    missing = torch.expm1(own - logs[:, 0] - logs[:, 1])
    grad.addcmul_(missing[:, None], keys)
    return Gradients(
        loss=loss.to(wide),
        left=grad * (factor * weight),
        right=None,
        scale=(dot_of_rows(queries, grad) * weight).to(wide),
    )


def _sums(queue: Tensor, queries: Tensor, ring: Ring, tiles: Tiles) -> Tensor:
    """Of this rank's queries over the whole queue, [n, 2], as `LogSums` has them."""
    block, behind = LogSums.none(ring.most, queue), Homeward(ring, LogSums.none(ring.most, queue).values)
    for chunk in ring.chunks(queries):
        for _, tile in tiles.of(queue, chunk):
            block.add(chunk.rows, tile, 0, tile)
        if chunk.last:
            behind.fold(block)
    return behind.home()


def _gradients(queue: Tensor, queries: Tensor, ring: Ring, tiles: Tiles, logs: Tensor) -> Tensor:
    """What the queue's keys add to the queries' gradients, without the factors that all derivatives have: [n, E]."""
    behind = Homeward(ring, queue.new_zeros(ring.most, queue.shape[1]))
    for chunk in ring.chunks(queries, [logs]):
        sums: Tensor | None = None
        for rows, tile in tiles.of(queue, chunk):
            log_shares(tile, chunk.notes[0], 0, tile).exp_()
            sums = behind.take(chunk.span) if sums is None else sums
            sums[: tile.shape[1]].addmm_(tile.t(), queue[rows])
        if sums is None:
            behind.take(chunk.span)
        behind.pass_on(chunk.span)
    return behind.home()
