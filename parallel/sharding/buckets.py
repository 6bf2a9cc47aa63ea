"""Flat buckets: parameters and fp32 gradients of a stage in a few contiguous tensors, reduced while backward runs.

Parameters become views of flat tensors, in the order in which backward finishes them; so do their gradients. A bucket
holds
parameters that are treated alike: summed over the same axes, counted alike in the global norm, decayed alike; so the
optimizer works on a handful of long tensors. Gradients of all micro-batches accumulate in place; the contribution
that completes a bucket starts its one reduction per step (Li et al. 2020, "PyTorch Distributed"), always in the order
of the buckets, so that all ranks of a group issue the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.comm import Axis
from parallel.grid import Grid
from parallel.layout import ParameterInfo, attach_info, info_of
from parallel.random import initialise
from parallel.tensor.weight_grad import attach_sink

BUCKET_BYTES = 32 << 20
_ALIGN = 16  # elements: a cache line of fp32, so that no two parameters share one


@dataclass(frozen=True)
class BucketKind:
    """What parameters of one bucket have in common.

    Attributes:
        decay: weight-decay group.
        sharded: whether tensor ranks hold different parts (each part counts in the norm) or copies (one counts).
        partial: whether gradients must also be summed over the tensor axis.
    """

    decay: str
    sharded: bool
    partial: bool

    @staticmethod
    def of(info: ParameterInfo, tensor_size: int) -> BucketKind:
        """The kind of bucket that a parameter belongs to."""
        return BucketKind(
            decay=info.decay,
            sharded=info.layout.is_sharded,
            partial=info.partial_over_tensor and tensor_size > 1,
        )


@dataclass
class Slot:
    """Where one parameter lies in its bucket."""

    name: str
    parameter: nn.Parameter
    offset: int
    grad: Tensor = field(repr=False)
    missing: int = 0  # contributions still to come in this step
    fresh: bool = True  # nothing written in this step


class Bucket:
    """Parameters that lie beside each other in one flat tensor, and their gradients in another.

    All ranks of `axis` hold the same parameters. Each has a shard of them, 1/size of the bucket, which it alone updates
    from ZeRO stage 1 on (Rajbhandari et al. 2020), and whose gradient norm it alone takes at every stage.

    Attributes:
        parameters: flat nn.Parameter [P], P a multiple of the ranks; its `.grad` is the flat gradient [P], fp32.
        shard: the elements of this rank.
        trained: what an optimizer is given: `parameters`, or this rank's shard of them.
        slots: the parameters, in order.
        axis: ranks over which gradients are summed.
    """

    def __init__(
        self,
        kind: BucketKind,
        axis: Axis,
        members: list[tuple[str, ParameterInfo]],
        device: torch.device,
        zero_stage: int = 0,
    ) -> None:
        self.kind, self.axis = kind, axis
        self.members = members
        sizes = [_aligned(torch.Size(info.layout.local_shape).numel()) for _, info in members]
        share = -(-sum(sizes) // (axis.size * _ALIGN)) * _ALIGN
        self.parameters = nn.Parameter(torch.zeros(share * axis.size, device=device))
        self.grads = torch.zeros_like(self.parameters)
        self.shard = slice(axis.index * share, (axis.index + 1) * share)
        self.trained = nn.Parameter(self.parameters.data[self.shard]) if zero_stage else self.parameters
        self.slots: list[Slot] = []
        offset = 0
        for (name, info), size in zip(members, sizes, strict=True):
            parameter = nn.Parameter(_view(self.parameters.data, offset, info))
            attach_info(parameter, info)
            self.slots.append(Slot(name, parameter, offset, _view(self.grads, offset, info)))
            offset += size
        self.missing = 0
        self.pending: comm.Pending | None = None


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGN) * _ALIGN


def _view(flat: Tensor, offset: int, info: ParameterInfo) -> Tensor:
    shape = torch.Size(info.layout.local_shape)
    return flat[offset : offset + shape.numel()].view(shape)


class GradientBuffer:
    """All buckets of the stages on this rank; takes every gradient contribution, and reduces each bucket once per step.

    Args:
        module: parameters on the meta device, made by parallel.layout.make_parameter; they are replaced by views of the
            buckets, and initialised from `seed`.
        grid: decides over which axes gradients are summed. device: where they live.
        bucket_bytes: size at which a bucket is closed.
        zero_stage: 0: every rank updates everything; 1: each updates its shard of every bucket, and gathers the rest.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        grid: Grid,
        device: torch.device,
        seed: int,
        bucket_bytes: int = BUCKET_BYTES,
        zero_stage: int = 0,
    ) -> None:
        self.zero_stage = zero_stage
        self.buckets = _make_buckets(module, grid, device, bucket_bytes, zero_stage)
        self._slot = {slot.parameter: (slot, bucket) for bucket in self.buckets for slot in bucket.slots}
        self._deferred: list[Callable[[], None]] | None = None
        self._next = 0
        _replace_parameters(module, {slot.name: slot.parameter for slot in self.slots})
        initialise(module, seed)
        for slot in self.slots:
            attach_sink(slot.parameter, self)
            slot.parameter.register_post_accumulate_grad_hook(self._take_grad)

    @property
    def slots(self) -> Iterator[Slot]:
        """Every parameter's place, bucket by bucket."""
        return (slot for bucket in self.buckets for slot in bucket.slots)

    def start_grad_sync(self, num_micro_batches: int) -> None:
        """Begin a step: every parameter expects one contribution per micro-batch; then its bucket is reduced."""
        self._next = 0
        for bucket in self.buckets:
            bucket.parameters.grad = bucket.grads
            if self.zero_stage:
                bucket.trained.grad = bucket.grads[bucket.shard]
            bucket.missing, bucket.pending = len(bucket.slots), None
            for slot in bucket.slots:
                slot.missing, slot.fresh = num_micro_batches, True

    def finish_grad_sync(self) -> None:
        """Wait until every bucket holds the sum over its axis: all of it, or from stage 1 on this rank's shard.

        Raises:
            RuntimeError: a parameter did not get its contributions, so that a reduction could not start.
        """
        if self._next < len(self.buckets):
            late = [slot.name for slot in self.slots if slot.missing]
            raise RuntimeError(f"no complete gradient for {', '.join(late[:5])}{' ...' if len(late) > 5 else ''}")
        for bucket in self.buckets:
            assert bucket.pending is not None
            if bucket.axis.size > 1:
                bucket.grads[bucket.shard].copy_(bucket.pending.wait())
        if self.zero_stage == 0:
            self.gather_gradients()

    def gather_gradients(self) -> None:
        """Give every rank all of every bucket's gradient. Collective."""
        self._gather([(bucket.grads, bucket) for bucket in self.buckets])

    def gather_parameters(self) -> None:
        """Give every rank the parameters that the others have updated. Collective, from stage 1 on."""
        if self.zero_stage:
            self._gather([(bucket.parameters.data, bucket) for bucket in self.buckets])

    @staticmethod
    def _gather(flats: list[tuple[Tensor, Bucket]]) -> None:
        started = [
            comm.all_gather_into_start(flat, flat[bucket.shard].clone(), bucket.axis)
            for flat, bucket in flats
            if bucket.axis.size > 1
        ]
        for pending in started:
            pending.wait()

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        """Add grad_output' x to the parameter's gradient, now or, inside `deferring`, when the products are run."""
        if self._deferred is not None:
            self._deferred.append(lambda: self._add_product(parameter, grad_output, x))
        else:
            self._add_product(parameter, grad_output, x)

    @contextmanager
    def deferring(self) -> Iterator[list[Callable[[], None]]]:
        """Put off the matrix products of weight gradients; the list that is given must be called, one by one, later."""
        products: list[Callable[[], None]] = []
        self._deferred = products
        try:
            yield products
        finally:
            self._deferred = None

    @torch.no_grad()
    def _add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        slot, bucket = self._slot[parameter]
        if slot.fresh:
            torch.mm(grad_output.t(), x, out=slot.grad)
        else:
            slot.grad.addmm_(grad_output.t(), x)
        self._arrived(slot, bucket)

    @torch.no_grad()
    def _take_grad(self, parameter: Tensor) -> None:
        """Hook: move what autograd accumulated in `.grad` into the bucket (nothing, where `add_product` took it)."""
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:
            return
        slot, bucket = self._slot[parameter]
        if slot.fresh:
            slot.grad.copy_(parameter.grad)
        else:
            slot.grad.add_(parameter.grad)
        parameter.grad = None
        self._arrived(slot, bucket)

    def _arrived(self, slot: Slot, bucket: Bucket) -> None:
        slot.fresh = False
        slot.missing -= 1
        assert slot.missing >= 0, f"{slot.name} got more gradients than micro-batches"
        bucket.missing -= slot.missing == 0
        while self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
            ready = self.buckets[self._next]
            # the sum is taken shard by shard at every stage, so that all stages add up in the same order
            ready.pending = comm.reduce_scatter_rows_start(ready.grads, ready.axis)
            self._next += 1

    def squared_norm(self, count_copies: bool) -> Tensor:
        """Sum of squares of this rank's shards of the gradients, fp32 scalar; over all ranks each element counts once.

        Args:
            count_copies: whether this tensor rank counts those of which every tensor rank holds the same.
        """
        counted = [
            bucket.grads[bucket.shard]
            for bucket in self.buckets
            if bucket.kind.sharded or bucket.kind.partial or count_copies
        ]
        if not counted:
            return torch.zeros((), device=self.buckets[0].grads.device)
        norms = torch._foreach_norm(counted)
        return torch.stack(norms).square().sum()


def _make_buckets(
    module: nn.Module, grid: Grid, device: torch.device, bucket_bytes: int, zero_stage: int
) -> list[Bucket]:
    """Group parameters by kind in backward order, close buckets at `bucket_bytes`; sorted by when they will be
    complete.
    """
    open_buckets: dict[BucketKind, list[tuple[str, ParameterInfo]]] = {}
    closed: list[tuple[int, BucketKind, list[tuple[str, ParameterInfo]]]] = []
    filled: dict[BucketKind, int] = {}
    last: dict[BucketKind, int] = {}
    for position, (name, parameter) in enumerate(reversed(list(module.named_parameters()))):
        info = info_of(parameter)
        kind = BucketKind.of(info, grid.tensor.size)
        open_buckets.setdefault(kind, []).append((name, info))
        filled[kind] = filled.get(kind, 0) + 4 * parameter.numel()
        last[kind] = position
        if filled[kind] >= bucket_bytes:
            closed.append((position, kind, open_buckets.pop(kind)))
            filled[kind] = 0
    closed += [(last[kind], kind, members) for kind, members in open_buckets.items()]
    replicas = ("data", "context")
    return [
        Bucket(kind, grid.along(*replicas, *(["tensor"] if kind.partial else [])), members, device, zero_stage)
        for _, kind, members in sorted(closed, key=lambda entry: entry[0])
    ]


def _replace_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Put `parameters` in the place of those of the same names."""
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
