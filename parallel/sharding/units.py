"""Units as they live: the buckets of neighbouring layers, and the reused buffers through which they are moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from parallel.sharding.buckets import Bucket
from parallel.sharding.plan import Slot

_LINE = 64  # bytes, to which buckets in a buffer are aligned


@dataclass(eq=False)
class Unit:
    """What is gathered and reduced at once.

    Attributes:
        index: among all units of this rank, in forward order, stage by stage. layers: their names.
        missing: gradient contributions still to come of this micro-batch. left: micro-batches still to come.
        complete: whether this micro-batch's gradient is there and waits for its turn to be reduced.
    """

    index: int
    layers: tuple[str, ...]
    buckets: list[Bucket] = field(repr=False)
    missing: int = 0
    left: int = 0
    complete: bool = False

    @cached_property
    def slots(self) -> list[Slot]:
        """Of its trained parameters."""
        return [slot for bucket in self.buckets if bucket.kind.trains for slot in bucket.slots]

    @cached_property
    def gathered(self) -> list[Bucket]:
        """Buckets of which this rank keeps a shard of the weights only."""
        return [bucket for bucket in self.buckets if bucket.is_gathered]

    @cached_property
    def staged(self) -> list[Bucket]:
        """Buckets whose gradients are reduced after each micro-batch."""
        return [bucket for bucket in self.buckets if bucket.kind.trains and bucket.grads is None]


def whole(bucket: Bucket) -> int:
    """Elements of all of a bucket."""
    return bucket.numel


def whole_anywhere(bucket: Bucket) -> int:
    """Elements of all of a bucket on the tensor rank where it is longest: the same number on all of them."""
    return bucket.numel_anywhere


def received(bucket: Bucket) -> int:
    """Elements that need room in its reduction: none in shared memory; through gloo all ranks' parts of the shard; on a
    GPU their sum.
    """
    if bucket.axis.channel is not None or (bucket.axis.planned and bucket.axis.shares):
        return 0
    return bucket.numel if bucket.weights.device.type == "cpu" else bucket.share


def bytes_of(
    buckets: Sequence[Bucket],
    dtype_of: Callable[[Bucket], torch.dtype],
    length_of: Callable[[Bucket], int] = whole,
) -> int:
    """Length of a buffer that holds these buckets, in that type."""
    return sum(-(-length_of(bucket) * dtype_of(bucket).itemsize // _LINE) * _LINE for bucket in buckets)


def views_in(
    memory: Tensor,
    buckets: Sequence[Bucket],
    dtype_of: Callable[[Bucket], torch.dtype],
    length_of: Callable[[Bucket], int] = whole,
) -> list[Tensor]:
    """Each bucket's place [P] in a buffer of bytes."""
    views, start = [], 0
    for bucket in buckets:
        size = length_of(bucket) * dtype_of(bucket).itemsize
        views.append(memory[start : start + size].view(dtype_of(bucket)))
        start += -(-size // _LINE) * _LINE
    return views


def weight_dtype(bucket: Bucket) -> torch.dtype:
    """Of its weights."""
    return bucket.kind.dtype


def gradient_dtype(bucket: Bucket) -> torch.dtype:
    """Of its gradients."""
    return bucket.gradient_dtype
