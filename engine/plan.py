"""What a run would allocate on a rank, found by building it and stepping through it on the meta device.

Nothing here repeats what the engine does: weights, gradients, optimizer state and buffers are the tensors that
`assemble` makes, and activations those that forward and backward of each kind of layer make, counted while they live
(`engine.layer_costs`) and added up as the rank's program runs them (`engine.recompute.peaks`): those that native
kernels and fused attention make, unless kernels is reference. Temporaries inside a kernel are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod

from engine.assemble import assemble
from engine.assembly import Assembly
from engine.config import Config
from engine.frozen import Frozen
from engine.layer_costs import META as META
from engine.layer_costs import LayerCosts
from engine.live_bytes import LiveBytes as LiveBytes
from engine.recompute.assignment import assignment
from engine.recompute.costs import LayerCost
from engine.recompute.peaks import StageCost, host_peak, peak
from engine.recompute.ranks import Place
from engine.recompute.save_sets import SaveSet
from engine.recompute.timing import kind_of
from model import TEACHER, Build, LayerSpec, ride_of
from parallel.grid import GridShape, planned_grid
from parallel.layout import info_of
from parallel.pipeline.actions import ActionKind, peak_activations
from parallel.pipeline.post import message_bytes
from parallel.sharding.buckets import Bucket

_SCRATCH = 4 * 2**20
"""What MKL or oneDNN, and the reading of images, hold on a CPU beside tensors: 3 to 5 MiB as measured in fp32."""
_MACHINE_CODE = 2 * 252 * 2**10
"""What oneDNN keeps of each 16-bit product: code made for its shape and strides, in pieces of 252 KiB, of which it has
22 for 11 products, 34 for 17, 129 for Swin-T's 62, and 54 for 17 of a width that is no multiple of 128."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank.

    Attributes:
        stages: of the pipeline, that the rank holds. states: what lives for the whole run, by what it is.
        activations: the most that forward and backward hold beside it, gradients on their way from one layer to the
            next included.
        host: the most that is in host memory meanwhile, on a GPU (on a CPU that is part of `activations`).
        micro_batches: whose activations are alive at once. schedule: its name. bubble: of the pipeline, as simulated.
    """

    stages: tuple[int, ...]
    states: dict[str, int]
    activations: int
    host: int
    micro_batches: float
    schedule: str
    bubble: float

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.states.values()) + self.activations


def states(assembly: Assembly, *, on_cpu: bool = False) -> dict[str, int]:
    """Bytes of what lives for the whole run; on a CPU what its libraries keep, too."""
    held = assembly.store.memory()
    if taught := sum(map(_of_teachers, assembly.store.buckets)):
        held |= {"weights": held["weights"] - taught, "teacher": taught}
    held["optimizer state"] = sum(t.nbytes for group in assembly.optimizer.state_tensors().values() for t in group)
    if assembly.fp8 is not None:
        held["weights in 8 bits"] = assembly.fp8.weight_bytes
    if kept := sum(products.weight_bytes for products in assembly.row_products):
        held["teacher in 8 bits"] = kept
    if assembly.queue is not None:
        held["queue of keys"] = assembly.queue.keys.nbytes
    if assembly.averages:
        held["weight average"] = sum(t.nbytes for average in assembly.averages for t in average.averages)
    if on_cpu:
        held["libraries"] = _libraries(assembly)
    return held


def _of_teachers(bucket: Bucket) -> int:
    """Bytes of its weights that are a teacher's."""
    taught = sum(slot.numel for slot in bucket.slots if slot.name.startswith(f"{TEACHER}."))
    return bucket.weights.nbytes * taught // max(1, sum(slot.numel for slot in bucket.slots))


def plan_memory(
    config: Config, shape: GridShape, rank: int, device_memory: float, *, on_cpu: bool = False
) -> MemoryPlan:
    """What `rank` of a world of this shape would hold.

    Args:
        config: resolved for that world. device_memory: bytes of a rank's device, which
            parallel.reshard_after_forward: auto looks at. on_cpu: whether ranks are processes of one host, without
            GPUs, that share memory.
    """
    assembly = planned(config, shape, rank, device_memory, on_cpu=on_cpu)
    at, costs = assembly.grid.pipeline.index, LayerCosts.of(assembly.config, shape, rank, on_cpu=on_cpu)
    program, stages = assembly.schedule.ranks[at], _stage_costs(assembly, costs, at)
    return MemoryPlan(
        stages=tuple(assembly.stages),
        states=states(assembly, on_cpu=on_cpu),
        activations=peak(program, stages) + _step_bytes(assembly, at),
        host=0 if on_cpu else host_peak(program, stages),
        micro_batches=peak_activations(assembly.schedule)[at],
        schedule=assembly.schedule.name,
        bubble=assembly.predicted.bubble_fraction,
    )


def planned(config: Config, shape: GridShape, rank: int, device_memory: float, *, on_cpu: bool = False) -> Assembly:
    """What `rank` would hold, on the meta device. Arguments as of `plan_memory`."""
    if config.kernels != "reference":
        config = replace(config, kernels="native")  # the shapes of what they make are known without them
    return assemble(config, planned_grid(shape, rank, shared_memory=on_cpu), META, device_memory=device_memory)


def _libraries(assembly: Assembly) -> int:
    """Bytes that a process on a CPU has beside its tensors. A linear takes three products (its output, the gradients of
    its input and of its weight), which are made once for linears of one shape."""
    if assembly.build.precision.dtype.itemsize > 2:
        return _SCRATCH
    named = [named for stage in assembly.stages.values() for named in stage.named_parameters()]
    shapes = {info_of(p).layout.local_shape for name, p in named if name.endswith("weight")}
    return _SCRATCH + 3 * sum(len(shape) == 2 for shape in shapes) * _MACHINE_CODE


def peaks(config: Config, shape: GridShape, device_memory: float, *, on_cpu: bool = False) -> tuple[int, ...]:
    """The peak of the first rank of each pipeline rank, as `plan_memory` finds it; arguments as there.

    One of them is built, for all; what lives for the whole run is built for each that has other layers.
    """
    a = planned(config, shape, 0, device_memory, on_cpu=on_cpu)
    costs, found = LayerCosts.of(a.config, shape, 0, on_cpu=on_cpu), list[int]()
    for rank, program in enumerate(a.schedule.ranks):
        kinds = tuple(stage_kind(a.layers, a.placement.layers[s], a.build, a.frozen) for s in a.placement.on(rank))
        first = rank * (shape.world_size // shape.pipeline)
        held = static_bytes(config, shape, first, device_memory, kinds, on_cpu=on_cpu) + _step_bytes(a, rank)
        found.append(held + peak(program, _stage_costs(a, costs, rank)))
    return tuple(found)


def static_bytes(
    config: Config,
    shape: GridShape,
    rank: int,
    device_memory: float,
    kinds: Hashable,
    *,
    on_cpu: bool = False,
    cut: Callable[[], Config] | None = None,
) -> int:
    """What lives for the whole run on a rank, found once for all layouts in which a rank has such layers.

    Args:
        kinds: of its stages, as `stage_kind` says. cut: how the configuration comes to have these layers there, if it
            has not yet. Others as of `plan_memory`.
    """
    at = tuple(index for name, index in shape.coordinates(rank).items() if name != "pipeline")
    key = _essential(config), shape.data, shape.context, shape.tensor, at, device_memory, on_cpu, kinds
    if key not in _STATIC:
        built = planned(cut() if cut else config, shape, rank, device_memory, on_cpu=on_cpu)
        _STATIC[key] = sum(states(built, on_cpu=on_cpu).values())
    return _STATIC[key]


_STATIC: dict[Hashable, int] = {}


def stage_kind(layers: Sequence[LayerSpec], own: Iterable[int], build: Build, frozen: Frozen) -> Hashable:
    """Equal for stages that hold as many bytes of weights, gradients and states.

    Args:
        layers: of the model. own: those of the stage.
    """

    def of(layer: LayerSpec) -> Hashable:
        names = (name.removeprefix(layer.name) for name in frozen.names if name.startswith(f"{layer.name}."))
        return kind_of(layer, build), frozenset(names)

    return tuple(of(layers[place]) for place in own)


def _essential(config: Config) -> Hashable:
    """What the states of given layers go by."""
    p = replace(
        config.parallel, pipeline_parallel_size=1, schedule="1f1b", virtual_stages=None, layers_per_stage=None,
        schedule_policy="static",
    )  # fmt: skip
    groups = (replace(group, passes="auto") for group in (config.contrastive, config.distillation))
    goal = config.objective, config.text, *groups
    return config.model, p, config.precision, config.optimizer, config.train.freeze, config.kernels, goal


def _stage_costs(a: Assembly, costs: LayerCosts, rank: int) -> dict[int, StageCost]:
    """What each stage of a pipeline rank holds, by its number."""
    program, sets = a.schedule.ranks[rank], assignment(a.config.recompute, a.layers, a.frozen.passes)
    of_kind = {kind: {x.stage for x in program if x.kind is kind} for kind in ActionKind}

    def layers(stage: int, *, ahead: bool = False) -> tuple[LayerCost, ...]:
        splits, notes = (stage in of_kind[kind] for kind in (ActionKind.BACKWARD_INPUT, ActionKind.RECOMPUTE))
        own = a.placement.layers[stage]
        if ahead and not notes:
            return ()
        return tuple(
            costs.cost(
                place, sets.get(a.layers[place].name, SaveSet()), notes=notes, ahead=ahead,
                **asdict(Place.of(place, own, len(a.layers), ride_of(a.layers, place), splits=splits)),
            )
            for place in own
        )  # fmt: skip

    return {
        stage: StageCost(
            layers=layers(stage),
            ahead=layers(stage, ahead=True),
            output=output,
            input_gradient=gradient,
        )
        for stage, (output, gradient) in _messages_of(a, rank).items()
    }


def _messages_of(a: Assembly, rank: int) -> dict[int, tuple[int, int]]:
    """By stage of a pipeline rank: bytes of what goes to the stage behind, and of what goes back to the one before."""
    before, behind = a.boundaries, [*a.boundaries[1:], ()]
    return {
        stage: (message_bytes(behind[stage]), message_bytes(tuple(s for s in before[stage] if s.carries_gradient)))
        for stage in a.placement.on(rank)
    }


def _step_bytes(a: Assembly, rank: int) -> int:
    """As `step_bytes`, on a pipeline rank."""
    return step_bytes(a, [a.placement.layers[stage] for stage in a.placement.on(rank)])


def step_bytes(a: Assembly, stages: Sequence[range]) -> int:
    """Of a step, beside activations, on a rank that has these stages: the images and texts of one micro-batch, if one
    of them reads them, and what the objective holds, if one has the last layer. Rows of stored outputs are left out.
    """
    size, found = a.config.train.micro_batch_size, dict[str, int]()
    assert size is not None
    for layer in (layer for layer in a.layers if layer.reads):
        of, count = a.build.of(layer), size * layer.per_sample
        each = {"images": 4 * of.sizes.channels * prod(of.sizes.image), "texts": 8 * of.tokens.count}
        found |= {what: count * each[what] for what in layer.reads if what in each}
    reads = {"images": a.objective.reads_images, "texts": a.objective.reads_texts}
    given = sum(count for what, count in found.items() if any(map(reads[what], stages)))
    samples = a.config.train.global_batch_size // a.grid.data.size
    has_last = any(own.stop == len(a.layers) for own in stages)
    return given + (a.objective.bytes_held(samples) if has_last else 0)
