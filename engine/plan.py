"""What a run would allocate on a rank, found by building it and stepping through it on the meta device.

Nothing here repeats what the engine does: weights, gradients, optimizer state and buffers are the tensors that
`assemble` makes, and activations those that forward and backward of each kind of layer make, counted while they live
(`engine.layer_costs`) and added up as the rank's program runs them (`engine.recompute.peaks`): those that native
kernels and fused attention make, unless kernels is reference. Temporaries inside a kernel are not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.assemble import Assembly, assemble
from engine.config import Config
from engine.layer_costs import META as META
from engine.layer_costs import LayerCosts, micro_batch
from engine.live_bytes import LiveBytes as LiveBytes
from engine.recompute.assignment import assignment
from engine.recompute.costs import LayerCost
from engine.recompute.peaks import StageCost, peak
from engine.recompute.save_sets import SaveSet
from parallel.grid import GridShape, planned_grid
from parallel.pipeline.actions import Action, ActionKind, peak_activations
from parallel.pipeline.post import message_bytes

_LIBRARIES = {4: 4 * 2**20, 2: 20 * 2**20}
"""By the size of a number: what MKL or oneDNN keeps on a CPU once it has multiplied, code made for each shape of a
product and scratch. Measured above live tensors after a step, MiB: 3.3, 3.9, 4.8 in fp32; 19 and 36 in bf16, where each
shape takes 0.3 to 0.7 (`docs/architecture.md` says how)."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank.

    Attributes:
        stages: of the pipeline, that the rank holds. states: what lives for the whole run, by what it is.
        activations: the most that forward and backward hold beside it, gradients on their way from one layer to the
            next included.
        micro_batches: whose activations are alive at once. schedule: its name. bubble: of the pipeline, as simulated.
    """

    stages: tuple[int, ...]
    states: dict[str, int]
    activations: int
    micro_batches: float
    schedule: str
    bubble: float

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.states.values()) + self.activations


def states(assembly: Assembly) -> dict[str, int]:
    """Bytes of what lives for the whole run."""
    held = assembly.store.memory()
    held["optimizer state"] = sum(t.nbytes for group in assembly.optimizer.state_tensors().values() for t in group)
    if assembly.fp8 is not None:
        held["weights in 8 bits"] = assembly.fp8.weight_bytes
    if assembly.average is not None:
        held["weight average"] = sum(t.nbytes for t in assembly.average.averages)
    return held


def plan_memory(
    config: Config, shape: GridShape, rank: int, device_memory: float, *, on_cpu: bool = False
) -> MemoryPlan:
    """What `rank` of a world of this shape would hold.

    Args:
        config: resolved for that world. device_memory: bytes of a rank's device, which
            parallel.reshard_after_forward: auto looks at. on_cpu: whether ranks are processes of one host, without
            GPUs, that share memory.
    """
    if config.kernels != "reference":
        config = replace(config, kernels="native")  # the shapes of what they make are known without them
    grid = planned_grid(shape, rank, shared_memory=on_cpu)
    assembly = assemble(config, grid, META, device_memory=device_memory)
    return MemoryPlan(
        stages=tuple(assembly.stages),
        states=states(assembly)
        | ({"libraries": _LIBRARIES[assembly.build.precision.dtype.itemsize]} if on_cpu else {}),
        activations=_activation_bytes(assembly, LayerCosts.of(config, shape, rank)),
        micro_batches=peak_activations(assembly.schedule)[grid.pipeline.index],
        schedule=assembly.schedule.name,
        bubble=assembly.predicted.bubble_fraction,
    )


def stage_costs(a: Assembly, costs: LayerCosts, sets: Mapping[str, SaveSet]) -> dict[int, StageCost]:
    """What each stage of a rank holds, by its number.

    Args:
        sets: by the names of the layers; others keep all.
    """
    of_kind = {kind: {x.stage for x in _program(a) if x.kind is kind} for kind in ActionKind}

    def layers(stage: int, *, ahead: bool = False) -> tuple[LayerCost, ...]:
        splits, notes = (stage in of_kind[kind] for kind in (ActionKind.BACKWARD_INPUT, ActionKind.RECOMPUTE))
        if ahead and not notes:
            return ()
        places = a.placement.layers[stage]
        ends = {places.start: {"first": True}, places.stop - 1: {"last": stage != a.placement.last}}
        if len(places) == 1:
            ends = {places.start: {"first": True, "last": stage != a.placement.last}}
        return tuple(
            costs.cost(
                place, sets.get(a.layers[place].name, SaveSet()), **ends.get(place, {}), splits=splits, notes=notes,
                ahead=ahead,
            )
            for place in places
        )  # fmt: skip

    return {
        stage: StageCost(
            layers=layers(stage),
            ahead=layers(stage, ahead=True),
            output=message_bytes([*a.boundaries, ()][stage + 1]),
            input_gradient=message_bytes(tuple(spec for spec in a.boundaries[stage] if spec.carries_gradient)),
        )
        for stage in a.stages
    }


def _program(a: Assembly) -> Sequence[Action]:
    return a.schedule.ranks[a.grid.pipeline.index]


def _activation_bytes(a: Assembly, costs: LayerCosts) -> int:
    """The most that forwards and backwards of this rank's program hold at once, and the images of one micro-batch."""
    sets = assignment(a.config.recompute, a.layers, a.frozen.passes)
    images = micro_batch(a).images
    return peak(_program(a), stage_costs(a, costs, sets)) + (0 if images is None else images.nbytes)
