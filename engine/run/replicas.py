"""Whether copies are still copies: what several ranks hold of the same elements is compared by hashes, now and then.

Data, context and tensor ranks that hold the same weights or the same state must have the same bits, in every layout and
at every ZeRO stage. Where one does not (a flipped bit, a faulty device, a library that is not deterministic), training
goes on as if nothing was, and what is saved is the state of nobody.

All is told by one number per rank. Of the n holders of a range of elements the first adds 1 - n times its hash of it,
the others add theirs, modulo 2^64: the sum over the world is zero if all agree, whoever shares what with whom. Only if
it is not, hashes are gathered one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.checkpoint.states import state_pieces
from engine.errors import DriftError
from engine.layer_list import layer_of
from engine.run.agreement import named_ranks
from parallel import comm
from parallel.digest import digest, signed
from parallel.layout import TensorLayout
from parallel.sharding.pieces import StatePiece

_END = (
    "; copies must have the same bits: the memory or the device of a rank is faulty, or does not compute what those of "
    "the others do. Nothing of this step is saved"
)
_Key = tuple[str, int, int, int]


class _Shared(NamedTuple):
    """Elements that several ranks hold.

    Attributes:
        name: of the piece. part: index of the tensor rank's part of the logical tensor that they are elements of.
        start, stop: which. ranks: of the world, in order: who holds them. values: here.
    """

    name: str
    part: int
    start: int
    stop: int
    ranks: tuple[int, ...]
    values: Tensor

    @property
    def key(self) -> _Key:
        """The same on all of `ranks`, and of nothing else."""
        return self.name, self.part, self.start, self.stop


def check_when_due(assembly: Assembly, step: int) -> None:
    """`check_replicas` after every `train.check_interval`-th step."""
    every = assembly.config.train.check_interval
    if every and step % every == 0:
        check_replicas(assembly, step)


def check_before_saving(assembly: Assembly, step: int) -> None:
    """`check_replicas`, unless `check_when_due` did it after this very step, or is never to."""
    every = assembly.config.train.check_interval
    if every and step % every:
        check_replicas(assembly, step)


def check_replicas(assembly: Assembly, step: int) -> None:
    """Return if all that more than one rank holds, weights, masters and state, is the same there, bit for bit.
    Collective over the world: one all-reduce of a number, if so. Every element that is shared is read once.

    Args:
        step: after which this is, for the message.

    Raises:
        DriftError: on every rank, with the first that differs, in the order of the model's layers, and the ranks.
    """
    world = assembly.grid.world
    if world.size == 1:
        return
    shared = list(_shared(assembly))
    hashes = [digest(each.values) for each in shared]
    total = torch.zeros(1, dtype=torch.int64, device=assembly.device)
    if shared:
        weights = torch.tensor([_weight(each, world.index) for each in shared], device=assembly.device)
        total += (torch.stack(hashes) * weights).sum()
    if not comm.all_reduce(total, world).item():
        return
    places = _places(assembly, shared)
    held = {s.key: (place, int(h)) for s, place, h in zip(shared, places, hashes, strict=True)}
    raise DriftError(f"step {step}: {_difference(comm.gather_objects(held, world))}")


# -- what is shared ----------------------------------------------------------------------------------------------------


def _shared(a: Assembly) -> Iterator[_Shared]:
    """What other ranks hold, too, of this rank's weights, as the model computes with them, and of its state."""
    seen = {bucket.weights.untyped_storage().data_ptr() for bucket in a.store.buckets}
    for piece in a.store.model_pieces("weights"):
        yield from _ranges(piece)
    for piece in state_pieces(a):
        if piece.values.untyped_storage().data_ptr() not in seen:  # else: masters that are the model's own weights
            name = piece.name.replace("weights/", "masters/", 1)
            yield from _ranges(replace(piece, name=name, values=piece.values.to(a.device)))


def _ranges(piece: StatePiece) -> Iterator[_Shared]:
    """A piece, cut where the holders of its elements change: of uneven tensor ranks, shards end in different places."""
    part = _part(piece.layout)
    holders = [h for h in piece.holders if _part(h.layout) == part]
    ends = {end for h in holders for end in (h.start, h.stop) if piece.start < end < piece.stop}
    for start, stop in pairwise(sorted({piece.start, piece.stop, *ends})):
        ranks = tuple(sorted(piece.axis.ranks[h.rank] for h in holders if h.start <= start and stop <= h.stop))
        if len(ranks) > 1:
            yield _Shared(piece.name, part, start, stop, ranks, piece.values[start - piece.start : stop - piece.start])


def _part(layout: TensorLayout) -> int:
    """Which part of the logical tensor a rank holds; 0: all of it, or the first."""
    return layout.index if layout.is_sharded else 0


def _weight(shared: _Shared, rank: int) -> int:
    """What this rank's hash is multiplied by: over all holders this is zero. Odd but for the first's, and of each range
    another, so that no two differences are the same number.
    """
    factor = int.from_bytes(blake2b(repr(shared.key).encode(), digest_size=7).digest()) | 1
    return signed(factor * (1 if rank != shared.ranks[0] else 1 - len(shared.ranks)) % (1 << 64))


# -- what differs ------------------------------------------------------------------------------------------------------


def _places(a: Assembly, shared: Sequence[_Shared]) -> list[tuple[int, int, int]]:
    """Of each in the order of the model: by layer, by parameter in it, weights before what belongs to them."""
    layers = {layer.name: place for place, layer in enumerate(a.layers)}
    parameters = {name: place for place, name in enumerate(a.parameters())}
    found = []
    for place, each in enumerate(shared):
        of = each.name.partition("/")[2]
        layer = layers.get(layer_of(of), len(layers)) if of else len(layers)
        found.append((layer, parameters.get(of, len(parameters)), place))
    return found


def _difference(everywhere: Sequence[Mapping[_Key, tuple[tuple[int, int, int], int]]]) -> str:
    """What differs first, on which ranks, and how much else does.

    Args:
        everywhere: of each rank, by key, (place in the model, hash).
    """
    hashes: dict[_Key, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    places: dict[_Key, tuple[int, int, int]] = {}
    for rank, held in enumerate(everywhere):
        for key, (place, value) in held.items():
            hashes[key][value].append(rank)
            places[key] = min(place, places.get(key, place))
    different = sorted((key for key, found in hashes.items() if len(found) > 1), key=lambda key: (places[key], key))
    if not different:
        return "hashes of what ranks have copies of agree, but their sum over all ranks does not say so" + _END
    names = list(dict.fromkeys(key[0] for key in different))
    what, _, parameter = names[0].partition("/")
    more = f" (so do {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{what}{f' of {parameter}' if parameter else ''} {_who(list(hashes[different[0]].values()))}{more}{_END}"


def _who(groups: Sequence[Sequence[int]]) -> str:
    """Which ranks differ from which: the few from the many, if there are many."""
    most, *rest = sorted(groups, key=lambda group: -len(group))
    if len(most) > len(rest[0]):
        few = sorted(rank for group in rest for rank in group)
        return f"differ on {named_ranks(few)} from those on {named_ranks(most)}"
    return "differ between " + " and ".join(map(named_ranks, groups))
