"""The parameters of this rank's pipeline stages: where they live, their gradients, and what an optimizer trains.

From modules whose parameters are on the meta device to modules that can be run: units and buckets are planned and
allocated, parameters bound to them and initialised, gradients wired to their buckets, and at ZeRO stage 3 units set to
be gathered before use. On the meta device all of it is built the same way, and takes no memory: that is how memory is
planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from parallel.grid import Grid
from parallel.layout import ParameterInfo, attach_info
from parallel.pipeline.actions import Action, ActionKind
from parallel.random import fill, key
from parallel.sharding.buckets import Bucket
from parallel.sharding.fragments import Fragments, Group, Holdings
from parallel.sharding.gather import Gatherer
from parallel.sharding.gradients import GradientSync
from parallel.sharding.pieces import StatePiece, pieces_of
from parallel.sharding.plan import GroupOf, Layers, ShardingPolicy, Slot, UnitPlan, plan_units
from parallel.sharding.units import Unit

_BACKWARD = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


def by_decay(name: str, info: ParameterInfo) -> Group:
    """Groups by weight decay alone."""
    return Group(info.decay)


def in_fp32(name: str) -> torch.dtype:
    """All weights in fp32."""
    return torch.float32


class ParameterStore:
    """All parameters of the pipeline stages on this rank.

    Args:
        stages: of each stage its layers, (name, module with parameters on the meta device) in forward order; the
            parameters are replaced by such as are bound to flat buckets, and initialised from `seed`.
        grid: decides what is summed and shared over which ranks. device: where everything lives.
        policy: what is shared out. group_of: the optimizer's group of a parameter. dtype_of: of a weight, by name.
        forward_only: layers that nothing goes backward through: at stage 3 they are not gathered for it.

    Attributes:
        recomputed: layers of which an R of the schedule has something run again.
    """

    def __init__(
        self,
        stages: Sequence[Layers],
        *,
        grid: Grid,
        device: torch.device,
        seed: int,
        policy: ShardingPolicy | None = None,
        group_of: GroupOf = by_decay,
        dtype_of: Callable[[str], torch.dtype] = in_fp32,
        forward_only: Set[str] = frozenset(),
    ) -> None:
        self.policy, self.device = policy or ShardingPolicy(), device
        self._forward_only = forward_only if self.policy.stage == 3 else frozenset[str]()
        self.axis = grid.along("data", "context", "tensor")
        self.stages: list[list[Unit]] = []
        for layers in stages:
            plans = plan_units(
                layers, tensor_size=grid.tensor.size, group_of=group_of, dtype_of=dtype_of,
                unit_bytes=self.policy.unit_bytes, forward_only=self._forward_only,
            )  # fmt: skip
            self.stages.append(self._allocate(plans, grid))
        self._unit_of = {layer: unit.index for unit in self.units for layer in unit.layers}
        self.recomputed = frozenset[str]()
        self._bind(stages)
        if device.type != "meta":
            self._initialise(seed)
        self.gatherer = Gatherer(self.units, device, self.policy.gather)
        self.gradients = GradientSync(self.stages, device, self.gatherer.lends)
        for layers, units in zip(stages, self.stages, strict=True):
            modules = dict(layers)
            for unit in units:
                if unit.gathered:
                    self.gatherer.watch(unit, [modules[layer] for layer in unit.layers])

    def _allocate(self, plans: Sequence[UnitPlan], grid: Grid) -> list[Unit]:
        """A stage's units, numbered on from those before."""
        axes = {False: grid.along("data", "context"), True: self.axis}
        units = []
        for index, plan in enumerate(plans, sum(map(len, self.stages))):
            buckets = [
                Bucket(kind, members, axes[kind.partial], grid.tensor, self.policy, self.device)
                for kind, members in plan.buckets.items()
            ]
            units.append(Unit(index, plan.layers, buckets))
        return units

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def units(self) -> list[Unit]:
        """Of all stages, in forward order."""
        return [unit for stage in self.stages for unit in stage]

    @property
    def buckets(self) -> list[Bucket]:
        """Of all units."""
        return [bucket for unit in self.units for bucket in unit.buckets]

    @property
    def slots(self) -> Iterator[Slot]:
        """Every parameter's place."""
        return (slot for bucket in self.buckets for slot in bucket.slots)

    def fragments(self) -> Fragments:
        """What an optimizer trains on this rank."""
        trains = [bucket for bucket in self.buckets if bucket.kind.trains]

        def holdings(own: bool) -> Holdings:
            return Holdings(lambda: {k: v for b in trains for k, v in b.holdings(own=own).items()})

        return Fragments(
            spans=[span for bucket in trains for span in bucket.spans()],
            fragments=[fragment for bucket in trains for fragment in bucket.fragments()],
            axis=self.axis,
            owned=holdings(True),
            trained=holdings(False),
        )

    def pieces(self, what: str, arrays: Mapping[Bucket, Tensor]) -> Iterator[StatePiece]:
        """Arrays that have an element for each of the buckets' masters, as pieces of logical tensors.

        Args:
            what: they are: stands before the names of the parameters.
        """
        for bucket, array in arrays.items():
            yield from pieces_of(what, array, bucket.parts, bucket.holdings(own=False), self.axis)

    def model_pieces(self, what: str) -> Iterator[StatePiece]:
        """The weights as this rank keeps them for the model to compute with: all of them, at stage 3 its shards.

        They are copies on every rank; which rank accounts for what is not said here (`StatePiece.own` is empty, but
        for shards).
        """
        for bucket in self.buckets:
            parts = bucket.parts if bucket.is_gathered else bucket.whole_parts
            holders = bucket.holdings(own=False, whole=not bucket.is_gathered)
            yield from pieces_of(what, bucket.weights, parts, holders, self.axis)

    def memory(self) -> dict[str, int]:
        """Bytes allocated on this rank, by what they hold."""
        held = {"weights": 0, "masters": 0, "gradients": 0}
        for bucket in self.buckets:
            for what, tensors in bucket.tensors().items():
                held[what] += sum(t.nbytes for t in tensors)
        held["gather buffers"] = sum(buffer.memory.nbytes for buffer in self.gatherer.buffers)
        held["reduction buffers"] = sum(buffer.nbytes for buffer in self.gradients.buffers)
        return held

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _bind(self, stages: Sequence[Layers]) -> None:
        """Put the slots' parameters in the places of those on the meta device."""
        homes = {name: module for layers in stages for name, module in layers}
        for unit in self.units:
            for bucket in unit.buckets:
                for slot in bucket.slots:
                    empty = bucket.is_gathered
                    data = (
                        torch.empty(0, dtype=bucket.kind.dtype, device=self.device)
                        if empty
                        else slot.view(bucket.weights)
                    )
                    slot.parameter = nn.Parameter(data, requires_grad=bucket.kind.trains)
                    attach_info(slot.parameter, slot.member.info)
                    for name in slot.member.names:
                        layer = max((l for l in homes if name.startswith(f"{l}.")), key=len)
                        owner, _, leaf = name.removeprefix(f"{layer}.").rpartition(".")
                        setattr(homes[layer].get_submodule(owner), leaf, slot.parameter)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Initial values of this rank's masters, a bucket at a time, and the weights rounded from them."""
        for bucket in self.buckets:
            whole = torch.zeros(bucket.numel, device=self.device)
            for slot in bucket.slots:
                info = slot.member.info
                fill(slot.view(whole), info.layout, info.init, key(seed, slot.name))
            bucket.master.copy_(whole[bucket.trained])
            bucket.weights.copy_(whole[bucket.shard] if bucket.is_gathered else whole)

    @torch.no_grad()
    def round_weights(self) -> None:
        """Make what the model computes with, as far as this rank trains it, of the fp32 masters."""
        for bucket in self.buckets:
            if bucket.model_weight is not None:
                bucket.model_weight.copy_(bucket.master)

    @torch.no_grad()
    def loaded(self) -> None:
        """Make all weights anew, frozen ones too, of masters that were written from without. Collective."""
        self.round_weights()
        self.gatherer.finish()
        self.gatherer.forget()
        for bucket in self.buckets:
            if bucket.stage in (1, 2):
                bucket.complete(bucket.weights)

    @torch.no_grad()
    def updated(self) -> None:
        """Tell every rank of the weights that the others have updated. Collective."""
        self.gatherer.finish()
        self.gatherer.forget()
        for bucket in self.buckets:
            if bucket.stage in (1, 2) and bucket.kind.trains:
                bucket.complete(bucket.weights)

    def use(self, layer: str) -> None:
        """Have a layer's weights in place, which is run again otherwise than by being called. Collective."""
        self.gatherer.use_forward(self._unit_of[layer])

    def plan(self, actions: Sequence[Action], stages: Sequence[int]) -> None:
        """Say what will be run next.

        Args:
            stages: the numbers of this rank's, in the order in which their layers were given.
        """
        if not self.gatherer.units:
            return
        place = dict(zip(stages, self.stages, strict=True))
        uses: list[int] = []
        for action in actions:
            if action.kind is ActionKind.FORWARD:
                uses += [unit.index for unit in place[action.stage]]
            elif action.kind is ActionKind.RECOMPUTE:
                uses += [u.index for u in place[action.stage] if not self.recomputed.isdisjoint(u.layers)]
            elif action.kind in _BACKWARD:
                uses += [u.index for u in reversed(place[action.stage]) if set(u.layers) - self._forward_only]
        self.gatherer.plan(uses)

    @torch.no_grad()
    def local_values(self, what: str = "master") -> dict[str, Tensor]:
        """This tensor rank's part of every parameter, put together from all ranks that share it, fp32. Collective.

        Args:
            what: `master`: the weights, or `sums`: their gradients, once `finish` was called.
        """
        values: dict[str, Tensor] = {}
        for bucket in self.buckets:
            own: Tensor = getattr(bucket, what)
            if own.numel() == 0:  # the gradient of frozen parameters
                continue
            if own.numel() < bucket.numel:
                own = bucket.gather_start(own.new_empty(bucket.numel), own).wait()
            values |= {slot.name: slot.view(own) for slot in bucket.slots}
        return values
