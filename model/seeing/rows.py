"""Rows of attention, computed again in fp32 from queries and keys: what share of its mixture a token takes of which.

Fused kernels give no maps, and maps of all tokens are too large to keep; rows of chosen queries are not. All kinds of
attention are of one form here: a row over all tokens of the image, zero where the kind sees nothing. That of linear
attention is implied: what its sums, multiplied out, weight the values with (its convolution apart). Who goes through
all rows of a layer is given them in blocks of some queries and the tokens that these may see: of windows and grids
those of a few groups.

Legend: B images, S tokens of an image, c of them on this rank, h heads on this rank, K head dim, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import DENOMINATOR, Attention, GroupedAttention
from model.groups import groups_of
from model.kernels.reference import feature
from model.taps import Site, Tapped
from parallel import comm

CHUNK_BYTES = 32 * 2**20
"""Of rows that are computed at once; a few times this is taken beside what is asked for."""
_BLOCK = 256  # queries of small groups that are taken together
_POWER = 3  # of the focused feature map


def _numbers(site: Site) -> Tensor:
    """int64 [S]: patches of equal numbers see each other, -1 for prefix tokens; of a kind with groups."""
    here, prefix, groups = site.here, site.tokens.prefix, groups_of(site.kind, site.here)
    filled = groups.patches >= 0
    numbers = torch.arange(len(groups.patches))[:, None] * (groups.region.max() + 1) + groups.region
    found = torch.full((prefix + here.rows * here.cols,), -1)
    found[prefix + groups.patches[filled]] = numbers[filled]
    return found


@dataclass(frozen=True)
class Sight:
    """How a layer sees.

    Attributes:
        site: of the layer. groups: as of `_numbers`, if the kind has groups. table: of relative positions [h, offsets],
            if there is one.
    """

    site: Site
    groups: Tensor | None = None
    table: Tensor | None = None

    @staticmethod
    def of(layer: Tapped) -> Sight:
        """As the layer is now: a copy of its table, which may be gathered for one pass."""
        mixer = layer.mixer if isinstance(layer, Attention) else None
        if not isinstance(mixer, GroupedAttention):
            return Sight(layer.site)
        table = mixer.relative_position
        return Sight(layer.site, _numbers(layer.site), None if table is None else table.detach().clone())

    @property
    def total(self) -> int:
        """S."""
        t = self.site.tokens
        return t.prefix + t.rows * t.cols

    @property
    def own(self) -> range:
        """The tokens that this rank holds."""
        t = self.site.tokens
        return range(0 if t.own_prefix else t.prefix + t.first * t.cols, t.prefix + t.stop * t.cols)

    def rows(
        self, q: Tensor, k: Tensor, queries: Tensor, heads: Tensor | slice = slice(None), keys: Tensor | None = None
    ) -> Tensor:
        """What each query takes of this rank's tokens.

        Collective over context ranks, whose shares of a row add up to 1 (of linear attention, nearly).

        Args:
            q: [B, Q, h, K], the queries, the same on all context ranks. k: [B, c, h, K]. queries: int64 [Q], which
                tokens they are. heads: which of the table's the h are. keys: int64 [c], which tokens those are, all of
                this rank's that the queries see among them (default: all of this rank's).

        Returns:
            [B, h, Q, c], fp32, or fp64 of fp64.
        """
        if self.site.kind == "linear":
            q, k = _wide(q, k)
            a, b = (feature(x, self.site.feature_map, _POWER) for x in (q, k))
            weights = a @ b.transpose(-2, -1)
            return weights / (comm.all_reduce(weights.sum(-1, keepdim=True), self.site.tokens.context) + DENOMINATOR)
        return self.shares(self.logits(q, k, queries, heads, keys))

    def logits(
        self, q: Tensor, k: Tensor, queries: Tensor, heads: Tensor | slice = slice(None), keys: Tensor | None = None
    ) -> Tensor:
        """What the softmax of `rows` is of, -inf where nothing is seen; not of linear attention. As of `rows`."""
        q, k = _wide(q, k)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        keys = torch.tensor(self.own) if keys is None else keys
        if self.table is not None:
            scores += self._bias(self.table[heads].to(scores.dtype).cpu(), queries, keys).to(scores.device)
        if (sees := self._sees(queries, keys)) is not None:
            scores.masked_fill_(~sees.to(scores.device), -math.inf)
        return scores

    def shares(self, logits: Tensor) -> Tensor:
        """Their softmax. Collective over context ranks."""
        axis = self.site.tokens.context
        if axis.size == 1:
            return logits.softmax(-1)
        top = F.pad(logits, (0, 1), value=-math.inf).amax(-1, keepdim=True)  # also of no tokens
        weights = (logits - comm.all_reduce(top, axis, "max")).exp_()
        return weights / comm.all_reduce(weights.sum(-1, keepdim=True), axis)

    def _sees(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Bool [Q, c]; None if all see all."""
        if self.site.kind == "causal":
            return queries[:, None] >= keys
        if self.groups is None:
            return None
        prefix = self.site.tokens.prefix
        from_prefix, to_prefix = queries[:, None] < prefix, keys < prefix
        same = self.groups[queries][:, None] == self.groups[keys]
        return from_prefix | torch.where(to_prefix, self.site.kind == "global_tokens", same)

    def _bias(self, table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Of relative positions [h, Q, c], zero for prefix tokens."""
        (high, wide), prefix, cols = self.site.here.window_sides, self.site.tokens.prefix, self.site.tokens.cols
        entry = torch.zeros(len(queries), len(keys), dtype=torch.int64)
        for place, side, width in ((lambda x: x // cols, high, 2 * wide - 1), (lambda x: x % cols, wide, 1)):
            apart = place(queries - prefix)[:, None] - place(keys - prefix)
            entry += (apart.clamp(1 - side, side - 1) + side - 1) * width
        patches = (queries >= prefix)[:, None] & (keys >= prefix)
        return torch.where(patches, table[:, entry], 0)


class Block(NamedTuple):
    """Rows of some queries, over all of this rank's tokens that they may see.

    Attributes:
        queries, keys: int64, numbers of tokens. places: of the keys among this rank's tokens.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Of this rank's tokens [B, c, ...], the keys."""
        return x if len(self.places) == x.shape[1] else x[:, self.places]

    @staticmethod
    def whole(rows: Tensor) -> Block:
        """Of all rows [..., Q, S] at once."""
        queries, keys = (torch.arange(count) for count in rows.shape[-2:])
        return Block(queries, keys, keys)


@dataclass(frozen=True)
class Seen:
    """What a layer has attended with in one forward pass, on one rank.

    Attributes:
        sight: of the layer. q: [B, c, h, K], of this rank's tokens, or [B, 1, h, K] of the probe. k, v: [B, c, h, K].
        grad: as q, of whatever was differentiated by what the heads give, if anything was. tensor: the ranks that share
            the heads, if there are others.
    """

    sight: Sight
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor | None = None
    tensor: comm.Axis | None = None

    @property
    def heads(self) -> int:
        """H, of all tensor ranks."""
        return self.sight.site.here.heads

    @property
    def tokens(self) -> int:
        """S."""
        return self.sight.total

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """All rows, some at a time: which, and [B, h, queries, keys]. Collective over context ranks, and as many on all
        tensor ranks."""
        for block in blocks_of(self.sight, self.k.shape[0] * self.heads):
            q = everywhere(self.sight, self.q, block.queries)
            yield block, self.sight.rows(q, block.of(self.k), block.queries, keys=block.keys)

    def gradients(self, block: Block) -> Tensor:
        """d(what was differentiated) / d(rows) [B, h, queries, keys], each entry taken for a variable of its own: that
        of the mixture by the value. Also where nothing is seen. Collective over context ranks."""
        assert self.grad is not None
        grad = everywhere(self.sight, self.grad, block.queries, is_part=True)
        wide = torch.promote_types(self.v.dtype, torch.float32)
        return torch.einsum("bqhk,bshk->bhqs", grad.to(wide), block.of(self.v).to(wide))

    def total(self, x: Tensor) -> Tensor:
        """The sum over context ranks and tensor ranks."""
        x = comm.all_reduce(x, self.sight.site.tokens.context)
        return x if self.tensor is None else comm.all_reduce(x, self.tensor)


def blocks_of(sight: Sight, each: int) -> Iterator[Block]:
    """All rows of a layer, some at a time: as many on all ranks that share it.

    Args:
        each: rows of a query, B * H.
    """
    own = torch.tensor(sight.own)
    here = torch.arange(len(own))
    if sight.groups is None:
        count = 1 if sight.site.kind == "probe" else sight.total
        yield from (Block(torch.arange(count)[part], own, here) for part in chunks_of(count, each * sight.total))
        return
    prefix, sees_prefix = sight.site.tokens.prefix, sight.site.kind == "global_tokens"
    yield from (Block(torch.arange(prefix)[part], own, here) for part in chunks_of(prefix, each * sight.total))
    numbers, counts = sight.groups[prefix:].unique(return_counts=True)
    side = max(int(counts.max()), _BLOCK)
    for some in numbers.split(max(1, side // int(counts.max()))):
        queries = torch.isin(sight.groups, some).nonzero()[:, 0]
        places = (torch.isin(sight.groups[own], some) | ((own < prefix) & sees_prefix)).nonzero()[:, 0]
        for part in chunks_of(len(queries), each * (len(queries) + prefix)):
            yield Block(queries[part], own[places], places)


def chunks_of(queries: int, row: int) -> Iterator[slice]:
    """Parts of the queries that take CHUNK_BYTES at most, where each has so many numbers."""
    step = max(1, CHUNK_BYTES // (4 * max(1, row)))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def rows_of(sight: Sight, q: Tensor, k: Tensor, queries: Tensor, heads: Tensor) -> Tensor:
    """Rows of chosen queries and heads, some at a time. Collective over context ranks.

    Args:
        q, k: [B, c, h, K], this rank's; of the probe q is [B, 1, h, K]. queries, heads: int64, of all tokens of the
            image, and of this rank's heads.

    Returns:
        [B, len(heads), len(queries), c] on the CPU.
    """
    q, k = (x.detach()[:, :, heads.to(x.device)] for x in (q, k))
    b, c, h, _ = k.shape
    out = torch.empty(b, h, len(queries), c, dtype=torch.promote_types(q.dtype, torch.float32))
    for part in chunks_of(len(queries), b * h * sight.total):  # as many on all context ranks
        some = everywhere(sight, q, queries[part])
        out[:, :, part] = sight.rows(some, k, queries[part], heads).cpu()
    return out


def everywhere(sight: Sight, x: Tensor, tokens: Tensor, *, is_part: bool = False) -> Tensor:
    """[B, c, h, K] of this rank's tokens -> those of chosen tokens [B, len(tokens), h, K], whosever they are, on all
    context ranks. Collective over them.

    Args:
        x: of the probe [B, 1, h, K]. is_part: of the probe, whether each context rank has a part of it, a gradient's.
    """
    axis, own = sight.site.tokens.context, sight.own
    if sight.site.kind == "probe":
        return comm.all_reduce(x.clone(), axis) if is_part else x
    if axis.size == 1:
        return x[:, tokens.to(x.device)]
    here = ((tokens >= own.start) & (tokens < own.stop)).to(x.device)
    local = torch.where(here, tokens.to(x.device) - own.start, 0)
    return comm.all_reduce(x[:, local] * here[:, None, None].to(x), axis)


def _wide(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, h, K] -> [B, h, S, K], fp32, or fp64 of fp64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide).transpose(1, 2), k.to(wide).transpose(1, 2)
