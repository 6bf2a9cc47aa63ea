"""The memory of a flat bucket: weights, fp32 masters, gradients; whole or this rank's shard, by ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.comm import Axis
from parallel.layout import attach_info
from parallel.sharding.fragments import Fragment, Group, Holding, Part, Span
from parallel.sharding.plan import ALIGN, BucketKind, Geometry, Member, ShardingPolicy, Slot


class Bucket:
    """Parameters that lie beside each other in one flat array of P elements, of which each rank of `axis` has a copy or
    a shard.

    Attributes:
        weights: what the model computes with, [P] or, sharded (stage 3), this rank's [share].
        master: fp32, what the optimizer updates: all of `weights` or this rank's shard of them, the same memory where
            the model computes in fp32.
        sums: fp32, the gradient summed over ranks and micro-batches, as long as `master`.
        numel, numel_anywhere: P; and the most that it is on any tensor rank, which all of them know: what decides the
            order of collectives goes by the latter.
        grads: [P], this rank's own gradient of the step, where it is kept until the end of the step; else None. In
            fp32, `sums` is the same memory.
    """

    def __init__(
        self,
        kind: BucketKind,
        members: Sequence[Member],
        axis: Axis,
        tensor: Axis,
        policy: ShardingPolicy,
        device: torch.device,
    ) -> None:
        self.kind, self.axis, self.tensor = kind, axis, tensor
        self.members = tuple(members)
        self.stage = policy.stage if axis.size > 1 else 0
        self.gradient_dtype = policy.gradients_in(kind.dtype)
        offsets, self.share = Geometry.of(members, tensor.index, axis.size)
        self.numel = self.share * axis.size
        self.numel_anywhere = axis.size * max(Geometry.of(members, t, axis.size).share for t in range(tensor.size))
        self.shard = slice(axis.index * self.share, (axis.index + 1) * self.share)
        self.trained = slice(0, self.numel) if self.stage == 0 else self.shard
        self.slots = [_slot(member, offset, tensor.index) for member, offset in zip(members, offsets, strict=True)]
        self._allocate(device, keeps=policy.reduce == "step" or axis.size == 1)

    def _allocate(self, device: torch.device, *, keeps: bool) -> None:
        def zeros(length: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(length, dtype=dtype, device=device)

        trained = self.trained.stop - self.trained.start
        self.weights = zeros(self.share if self.is_gathered else self.numel, self.kind.dtype)
        self.grads: Tensor | None = None
        self.model_weight: Tensor | None = None
        own = self.weights if self.is_gathered else self.weights[self.trained]
        if not self.kind.trains:
            self.master, self.sums = own, zeros(0, torch.float32)
            return
        fp32 = self.kind.dtype == torch.float32
        self.master = own if fp32 else zeros(trained, torch.float32)
        self.model_weight = None if fp32 else own
        if keeps:
            self.grads = zeros(self.numel, self.gradient_dtype)
        whole = self.grads is not None and self.gradient_dtype == torch.float32
        self.sums = self.grads[self.trained] if whole and self.grads is not None else zeros(trained, torch.float32)

    @property
    def is_gathered(self) -> bool:
        """Whether this rank keeps a shard of the weights only, and gathers all before use."""
        return self.stage == 3

    @property
    def own_sums(self) -> Tensor:
        """The part of `sums` that this rank adds up: its shard."""
        return self.sums[self.shard] if self.stage == 0 else self.sums

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything that is held, by what it is; no memory twice."""
        apart = self.kind.trains and self.kind.dtype != torch.float32
        held = {
            "weights": [self.weights],
            "masters": [self.master] if apart else [],
            "gradients": [t for t in (self.grads,) if t is not None],
        }
        if self.grads is None or self.gradient_dtype != torch.float32:
            held["gradients"].append(self.sums)
        return held

    @cached_property
    def counted(self) -> list[Tensor]:
        """The parts of `sums` whose squares make up this rank's share of the global norm: each element counts once."""
        return [
            self.sums[start:stop]
            for start, stop in _merged((s.offset, s.offset + s.numel) for s in self.slots if self._counts(s.member))
            for start, stop in [self._within(start, stop, self.shard)]
            if start < stop
        ]

    def _counts(self, member: Member) -> bool:
        return not member.copied or self.tensor.index == 0

    def _within(self, start: int, stop: int, part: slice) -> tuple[int, int]:
        """Elements [start, stop) of the bucket that are in `part`, counted from the start of `trained`."""
        first, last = max(start, part.start), min(stop, part.stop)
        base = self.trained.start
        return (first - base, last - base) if first < last else (0, 0)

    @cached_property
    def parts(self) -> list[Part]:
        """What of each parameter is trained here (if it is frozen: held), and where it lies in `master`."""
        found = []
        for slot in self.slots:
            place = slot.offset, slot.offset + slot.numel
            start, stop = self._within(*place, self.trained)
            first, last = self._within(*place, self.shard) if self._counts(slot.member) else (0, 0)
            own = slice(first - start, last - start) if first < last else slice(0, 0)
            base = slot.offset - self.trained.start if start < stop else start
            found.append(Part(slot.name, slot.member.info.layout, start - base, stop - base, own, start))
        return found

    def spans(self) -> Iterator[Span]:
        """What is trained, as one array per run of parameters of one group."""
        groups: dict[Group, list[tuple[int, int]]] = {}
        for slot in self.slots:
            groups.setdefault(slot.member.group, []).append((slot.offset, slot.offset + slot.numel))
        for group, places in groups.items():
            for start, stop in _merged(places):
                lo, hi = self._within(start, stop, self.trained)
                if lo < hi:
                    inside = (part for part in self.parts if part.start < part.stop and lo <= part.offset < hi)
                    parts = [part._replace(offset=part.offset - lo) for part in inside]
                    yield Span(group, parts, *self._arrays(lo, hi))

    def _arrays(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        model = None if self.model_weight is None else self.model_weight[start:stop]
        return self.master[start:stop], self.sums[start:stop], model

    def fragments(self) -> Iterator[Fragment]:
        """What is trained, parameter by parameter."""
        for slot, part in zip(self.slots, self.parts, strict=True):
            member, arrays = slot.member, self._arrays(part.offset, part.offset + part.stop - part.start)
            yield Fragment(slot.name, member.info, member.group, part.start, part.stop, part.own, *arrays)

    @property
    def whole_parts(self) -> list[Part]:
        """What of each parameter lies where in `weights`, where these are all of the bucket."""
        return [Part(s.name, s.member.info.layout, 0, s.numel, slice(0, 0), s.offset) for s in self.slots]

    def holdings(self, *, own: bool, whole: bool = False) -> dict[str, list[Holding]]:
        """By parameter: which rank of data x context x tensor holds which elements: accounts for them (`own`), or
        updates them, or computes with them (`whole`: where none holds a shard of the weights only).
        """
        found: dict[str, list[Holding]] = {member.names[0]: [] for member in self.members}
        for t in range(self.tensor.size):
            offsets, share = Geometry.of(self.members, t, self.axis.size)
            for member, offset in zip(self.members, offsets, strict=True):
                if own and member.copied and t:
                    continue
                layout = member.info.layout
                layout = layout if layout.dim is None else replace(layout, index=t)
                end, everywhere = offset + member.numel(t), whole or (not own and self.stage == 0)
                shards = range(self.axis.size) if everywhere else range(offset // share, -(-end // share))
                for rank, index in self._ranks(t, shards if end > offset else range(0)):
                    part = range(share * self.axis.size) if everywhere else range(index * share, (index + 1) * share)
                    first, last = max(offset, part.start), min(end, part.stop)
                    if first < last:
                        found[member.names[0]].append(Holding(rank, layout, first - offset, last - offset))
        return found

    def _ranks(self, tensor_index: int, shards: range) -> Iterator[tuple[int, int]]:
        """(index along data x context x tensor, index along `axis`) of the ranks with this tensor index that have one
        of these shards.
        """
        size = self.tensor.size
        for index in shards:
            if not self.kind.partial:
                yield index * size + tensor_index, index
            elif index % size == tensor_index:
                yield index, index

    def complete(self, flat: Tensor) -> None:
        """Give every rank all of `flat` [P], of which each has its shard. Collective."""
        self.gather_start(flat, flat[self.shard].clone()).wait()

    def gather_start(self, out: Tensor, own: Tensor) -> comm.Pending:
        """Start gathering every rank's `own` [share] into `out` [P]."""
        return comm.all_gather_into_start(out, own, self.axis)


def _slot(member: Member, offset: int, tensor_index: int) -> Slot:
    parameter = nn.Parameter(torch.empty(0, dtype=member.kind.dtype), requires_grad=member.kind.trains)
    attach_info(parameter, member.info)
    return Slot(member.names[0], member, offset, member.numel(tensor_index), parameter, len(member.names))


def _merged(places: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges joined across the gaps of alignment."""
    ordered = sorted(places)
    if not ordered:
        return
    start = ordered[0][0]
    for (_, end), (begin, _) in pairwise(ordered):
        if begin - end >= ALIGN:
            yield start, end
            start = begin
    yield start, ordered[-1][1]
