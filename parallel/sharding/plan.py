"""Where every parameter lies: layers grouped into units, parameters of a unit into flat buckets. Nothing is allocated.

A *unit* is what is gathered and reduced at once: one layer, or several neighbours that are small. Within a unit,
parameters that are summed over the same ranks and have one dtype are a *bucket*, a flat array that is cut into one
shard per rank that holds a copy of it (Rajbhandari et al. 2020, ZeRO; Zhao et al. 2023, FSDP's flat parameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from parallel.layout import ParameterInfo, info_of
from parallel.sharding.fragments import Group

ALIGN = 16  # elements: a cache line of fp32, so that no two parameters share one
GroupOf = Callable[[str, ParameterInfo], Group]
Layers = Sequence[tuple[str, nn.Module]]


@dataclass(frozen=True, kw_only=True)
class ShardingPolicy:
    """What is shared out among the ranks that hold copies, and how gradients travel.

    Attributes:
        stage: of ZeRO: 0: nothing; 1: optimizer state; 2: gradients too; 3: weights too.
        reduce: when gradients are summed over ranks: once per `step`, each rank keeping all of them until then, or
            after each `micro_batch` (always, from stage 2 on).
        gradient_dtype: in which they are kept and sent: None: that of the weights. The sum over ranks is kept in fp32.
        gather: stage 3: how many bytes of gathered weights may be kept; of units in use, two always are.
        unit_bytes: small layers are grouped until their weights take this much in fp32.
    """

    stage: int = 0
    reduce: Literal["step", "micro_batch"] = "step"
    gradient_dtype: torch.dtype | None = torch.float32
    gather: float = 0.0
    unit_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        assert self.stage < 2 or self.reduce == "micro_batch", self

    def gradients_in(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the gradients of weights of type `dtype`."""
        return dtype if self.gradient_dtype is None else self.gradient_dtype


class BucketKind(NamedTuple):
    """What parameters of one bucket have in common.

    Attributes:
        partial: whether gradients must also be summed over the tensor axis. dtype: of the weights.
        trains: False for frozen parameters, which have no gradient.
    """

    partial: bool
    dtype: torch.dtype
    trains: bool


class Member(NamedTuple):
    """A parameter on its way into a bucket.

    Attributes:
        names: all under which the stage's modules hold it; the first is its own. copied: whether other tensor ranks
            hold the same elements, of which one rank accounts for in sums.
    """

    names: tuple[str, ...]
    info: ParameterInfo
    group: Group
    kind: BucketKind
    copied: bool

    def numel(self, tensor_index: int) -> int:
        """Elements that tensor rank `tensor_index` holds."""
        layout = self.info.layout
        return math.prod((layout if layout.dim is None else replace(layout, index=tensor_index)).local_shape)


@dataclass
class Slot:
    """Where one parameter lies in its bucket, and the state of its gradient in this step.

    Attributes:
        offset, numel: elements of the flat bucket. parameter: what modules compute with; its data is bound to memory
            by the store. grad: the view that contributions are added up in, None while there is none.
        uses: contributions per micro-batch: tied parameters get one for each place.
        missing: contributions still to come. fresh: nothing written yet.
    """

    name: str
    member: Member
    offset: int
    numel: int
    parameter: nn.Parameter
    uses: int
    grad: Tensor | None = field(repr=False, default=None)
    missing: int = 0
    fresh: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this tensor rank's part."""
        return self.member.info.layout.local_shape

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's elements of an array laid out as the bucket is."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


class Geometry(NamedTuple):
    """Offsets of a bucket's members, and the length of each of its equal shards."""

    offsets: tuple[int, ...]
    share: int

    @staticmethod
    def of(members: Sequence[Member], tensor_index: int, replicas: int) -> Geometry:
        """On tensor rank `tensor_index`, cut into `replicas` shards; all replicas find the same."""
        offsets, end = [], 0
        for member in members:
            offsets.append(end)
            end += -(-member.numel(tensor_index) // ALIGN) * ALIGN
        return Geometry(tuple(offsets), -(-end // (replicas * ALIGN)) * ALIGN)


class UnitPlan(NamedTuple):
    """Layers that are gathered and reduced at once."""

    layers: tuple[str, ...]
    buckets: dict[BucketKind, list[Member]]


def plan_units(
    layers: Layers,
    *,
    tensor_size: int,
    group_of: GroupOf,
    dtype_of: Callable[[str], torch.dtype],
    unit_bytes: int,
    forward_only: Set[str] = frozenset(),
) -> list[UnitPlan]:
    """Units of a stage in forward order.

    Args:
        layers: (name, module with parameters on the meta device), in forward order.
        group_of: the optimizer's group of a parameter. dtype_of: of a weight, by its name. forward_only: layers that
            nothing goes backward through: they share no unit with others, so that it need not be gathered for backward.
    """
    names = _names(layers)
    units = []
    for run in _runs(layers, names, unit_bytes, forward_only):
        buckets: dict[BucketKind, list[Member]] = {}
        for layer, module in reversed(run):
            for inner, parameter in reversed(list(module.named_parameters())):
                own = names[parameter]
                if own[0] != f"{layer}.{inner}":
                    continue  # tied: it lies where it came first
                info = info_of(parameter)
                kind = BucketKind(
                    info.partial_over_tensor and tensor_size > 1, dtype_of(own[0]), parameter.requires_grad
                )
                copied = not (info.layout.is_sharded or kind.partial)
                buckets.setdefault(kind, []).append(Member(own, info, group_of(own[0], info), kind, copied))
        for members in buckets.values():  # neighbours of one group make one span
            members.sort(key=lambda m: (m.copied, m.group))
        units.append(UnitPlan(tuple(layer for layer, _ in run), dict(sorted(buckets.items(), key=lambda b: str(b[0])))))
    return units


def _names(layers: Layers) -> dict[nn.Parameter, tuple[str, ...]]:
    """All names of each parameter."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for layer, module in layers:
        for inner, parameter in module.named_parameters(remove_duplicate=False):
            names[parameter] = (*names.get(parameter, ()), f"{layer}.{inner}")
    return names


def _runs(
    layers: Layers, names: dict[nn.Parameter, tuple[str, ...]], unit_bytes: int, forward_only: Set[str]
) -> Iterable[list[tuple[str, nn.Module]]]:
    """Neighbouring layers until they hold `unit_bytes`, or backward goes through one and not the next; never cut
    between two that share a parameter.

    Sizes are those of the logical tensors, so that all ranks of a tensor axis group alike, however heads are dealt out.
    """
    place = {layer: i for i, (layer, _) in enumerate(layers)}
    last_use = {
        p: max(i for layer, i in place.items() for name in owners if name.startswith(f"{layer}."))
        for p, owners in names.items()
        if len(owners) > 1
    }
    run: list[tuple[str, nn.Module]] = []
    filled, until = 0, -1
    for i, (layer, module) in enumerate(layers):
        run.append((layer, module))
        filled += sum(4 * math.prod(info_of(p).layout.shape) for p in module.parameters())
        until = max([until, *(last_use.get(p, -1) for p in module.parameters())])
        turns = i + 1 < len(layers) and (layer in forward_only) != (layers[i + 1][0] in forward_only)
        if (filled >= unit_bytes or turns) and i >= until:
            yield run
            run, filled = [], 0
    if run:
        yield run
