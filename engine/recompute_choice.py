"""`recompute.policy: auto`: the save set that each block gets, such that every rank stays within its budget of memory
and computes the least again.

A configuration that asks for it becomes one that names a save set for every block, before anything is built; what runs
is then a policy as any other. The bytes are those of `engine.plan`, found on the meta device by the code that
allocates; the times are given. Every pipeline rank has its own stages and micro-batches alive, and so its own solution
(`engine.recompute.solve`), the same for all ranks that share its layers: that of the first of them, which holds most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.assemble import Assembly, enable_8_bits
from engine.config import Config, RecomputeConfig
from engine.errors import ConfigError
from engine.layer_costs import LayerCosts
from engine.objectives import make_objective
from engine.plan import MemoryPlan, ends, image_bytes, messages_of, plan_memory, planned, program_of, states
from engine.precision.precision import precision_of
from engine.recompute.ahead import flops_again
from engine.recompute.costs import LayerCost
from engine.recompute.save_sets import SAVE_SETS, SaveSet, save_set
from engine.recompute.solve import Infeasible, solve
from engine.recompute.timing import Timing
from model import Build
from model.kernels import Kernels
from parallel import comm
from parallel.grid import Grid, GridShape
from parallel.pipeline.actions import ActionKind
from parallel.tensor import TensorParallel

Seconds = Callable[[str, str], float]
"""What computing a layer again takes for a micro-batch: its name, that of a save set."""

_FLOPS = 1e12  # a second, where nobody knows
_RUNS = 3  # of each kind of layer that is timed


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `choose` has found.

    Attributes:
        config: with a save set for each block. budget: bytes that a rank may take. peaks: of each pipeline rank, as
            planned. seconds: of each, that a step computes again.
    """

    config: Config
    budget: int
    peaks: tuple[int, ...]
    seconds: tuple[float, ...]

    def describe(self) -> str:
        """A line for the start-up report."""
        peaks = ", ".join(f"{peak / 2**20:,.1f}" for peak in self.peaks)
        seconds = ", ".join(f"{1e3 * s:,.1f}" for s in self.seconds)
        return (
            f"recompute: chosen within {self.budget / 2**20:,.1f} MiB per rank: {peaks} MiB planned, {seconds} ms of a "
            "step computed again (by pipeline rank)"
        )


def settled(config: Config, grid: Grid, device: torch.device, memory: float) -> tuple[Config, list[str]]:
    """The configuration that a run has, with times measured on its devices, and lines for its report. Collective.

    Args:
        config: resolved. memory: bytes that this rank may count on; what goes by it goes by the least of all ranks.

    Raises:
        ConfigError: as `choose`.
    """
    if not config.recompute.is_auto:
        return config, []
    times = comm.gather_objects(_measured(config, grid, device), grid.world)[0]
    choice = choose(
        config, grid.shape, comm.least(memory, grid.world), lambda layer, of: times[layer, of],
        on_cpu=device.type == "cpu",
    )  # fmt: skip
    return choice.config, [choice.describe()]


def check_budget(config: Config, shape: GridShape, memory: float, *, on_cpu: bool) -> None:
    """What `choose` refuses whatever the times, before ranks talk."""
    if config.recompute.is_auto:
        choose(config, shape, memory, lambda layer, of: 0.0, on_cpu=on_cpu)


def _measured(config: Config, grid: Grid, device: torch.device) -> dict[tuple[str, str], float]:
    """Seconds by layer and save set, on this device."""
    layers = make_objective(config).layers
    precision = precision_of(config.precision, layers)
    build = Build(
        config=config.model,
        tp=TensorParallel(axis=grid.tensor, sequence_parallel=config.parallel.sequence_parallel),
        context=grid.context,
        kernels=Kernels(config.kernels),
        precision=precision,
    )
    assert config.train.micro_batch_size is not None
    timing = Timing(
        layers=layers, build=build, batch_size=config.train.micro_batch_size,
        prepare=lambda module: enable_8_bits(config.precision, [module], precision, device),
    )  # fmt: skip
    times = timing.measured(device, _RUNS)
    return {(layer, name): of.recompute_seconds(name) for layer, of in times.items() for name in SAVE_SETS}


def by_flops(config: Config) -> Seconds:
    """Times where there is no device: of products alone, at a rate that is the same for all."""
    layers, images = make_objective(config).layers, config.train.micro_batch_size or 1
    names = [layer.name for layer in layers]
    again = {
        name: dict(zip(names, flops_again(layers, dict.fromkeys(names, of), config.model), strict=True))
        for name, of in SAVE_SETS.items()
    }
    return lambda layer, name: again[name][layer] * images / _FLOPS


def choose(config: Config, shape: GridShape, memory: float, seconds: Seconds, *, on_cpu: bool) -> Choice:
    """Save sets for every block.

    Args:
        config: resolved, with recompute.policy auto. memory: bytes of a rank's device, or of its share of a host.
        on_cpu: as `engine.plan.plan_memory`.

    Raises:
        ConfigError: no save sets keep all ranks within the budget.
    """
    if again := config.pipeline(shape).schedule(config.num_micro_batches(shape)).recomputes:
        raise ConfigError(
            f"parallel.schedule {config.parallel.schedule} has recomputes ({again[0]} and so on), but recompute.policy "
            "auto places them itself, if they fit: leave them out, or name the save sets"
        )
    budget = config.recompute.budget(memory)
    keeps_all = replace(config, recompute=RecomputeConfig(ahead=config.recompute.ahead))
    apart = shape.world_size // shape.pipeline
    names, taken, too_little = dict[str, str](), list[float](), dict[int, int]()
    for rank in range(shape.pipeline):
        a = planned(keeps_all, shape, rank * apart, memory, on_cpu=on_cpu)
        costs = LayerCosts.of(a.config, shape, rank * apart)
        static = sum(states(a, on_cpu=on_cpu).values()) + image_bytes(a)
        try:
            found, time = _solve(a, costs, static, budget, seconds)
        except Infeasible as error:
            too_little[rank] = error.smallest
            continue
        names |= found
        taken.append(time)
    if too_little:
        raise _refusal(config, budget, memory, too_little)
    chosen, plans = _ahead_within(_named(config, names), shape, memory, budget, on_cpu=on_cpu)
    return Choice(config=chosen, budget=budget, peaks=tuple(plan.peak for plan in plans), seconds=tuple(taken))


def _solve(a: Assembly, costs: LayerCosts, static: int, budget: int, seconds: Seconds) -> tuple[dict[str, str], float]:
    """Save sets by layer of a rank, and the seconds that they take in a step."""
    tables = {stage: _tables(a, stage, costs, seconds) for stage in a.stages}
    found = solve(tables, program_of(a), static=static, messages=messages_of(a), budget=budget)
    return {
        a.layers[place].name: name
        for stage, sets in found.sets.items()
        for place, name in zip(a.placement.layers[stage], sets, strict=True)
    }, found.seconds


def _tables(a: Assembly, stage: int, costs: LayerCosts, seconds: Seconds) -> Sequence[Mapping[str, LayerCost]]:
    """What each layer of a stage may have."""
    splits = any(x.kind is ActionKind.BACKWARD_INPUT and x.stage == stage for x in program_of(a))
    places = a.placement.layers[stage]
    tables = []
    for place in places:
        spec, merges = a.layers[place], place + 1 < len(a.layers) and a.layers[place + 1].name.startswith("merges.")
        found: Mapping[str, LayerCost]
        if spec.name.startswith("blocks.") and a.frozen.passes[place] > 1:
            found = costs.by_set(place, **ends(a, stage, place), splits=splits)
            if merges:  # which would go with it
                found = {name: cost for name, cost in found.items() if "merge" not in save_set(name).drops}
        else:
            found = {"all": costs.cost(place, SaveSet(), **ends(a, stage, place), splits=splits)}
        tables.append({name: replace(cost, seconds=seconds(spec.name, name)) for name, cost in found.items()})
    return tables


def _named(config: Config, names: Mapping[str, str]) -> Config:
    depth = config.model.sizes.depth
    sets = tuple(names.get(f"blocks.{i}", "all") for i in range(depth))
    return replace(config, recompute=replace(config.recompute, policy=sets, memory_budget="auto"))


def _ahead_within(
    config: Config, shape: GridShape, memory: float, budget: int, *, on_cpu: bool
) -> tuple[Config, list[MemoryPlan]]:
    """Recomputing ahead, unless what then lies recomputed is too much."""
    apart = shape.world_size // shape.pipeline

    def plans(of: Config) -> list[MemoryPlan]:
        return [plan_memory(of, shape, rank * apart, memory, on_cpu=on_cpu) for rank in range(shape.pipeline)]

    found = plans(config)
    if max(plan.peak for plan in found) > budget and config.recompute.ahead != "never":
        config = replace(config, recompute=replace(config.recompute, ahead="never"))
        found = plans(config)
    return config, found


def _refusal(config: Config, budget: int, memory: float, smallest: Mapping[int, int]) -> ConfigError:
    rank, least = max(smallest.items(), key=lambda item: item[1])
    of = f", of {memory / 2**20:,.0f} MiB" if budget != memory else ""
    cures = [f"recompute.memory_budget {least}"]
    if (size := config.train.micro_batch_size or 1) > 1:
        cures.append(f"train.micro_batch_size {size // 2}")
    if config.parallel.zero_stage < 3:
        cures.append(f"parallel.zero_stage {config.parallel.zero_stage + 1} with more data ranks")
    return ConfigError(
        f"recompute.memory_budget is {config.recompute.memory_budget} ({budget / 2**20:,.1f} MiB{of}), but with "
        f"everything computed again pipeline rank {rank} needs {least / 2**20:,.1f} MiB: give {', '.join(cures)}, or "
        "more ranks that split the layers"
    )
