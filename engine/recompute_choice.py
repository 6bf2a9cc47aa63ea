"""`recompute.policy: auto`: the layers that each stage gets and the save set of each block, such that every rank stays
within its budget of memory and the slowest takes least time.

A configuration that asks for it becomes one that names both, before anything is built; what runs is then a policy and a
cut as any other. The bytes are those of `engine.plan`, found on the meta device by the code that allocates; the times
are given. Every pipeline rank has its own stages and micro-batches alive, and so its own solution
(`engine.recompute.solve`), the same for all ranks that share its layers: that of the first of them, which holds most.
What an R would hold ahead of its backward is looked at afterwards: ranks compute again ahead if all of that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.config import Config
from engine.config.limits import divisors
from engine.errors import ConfigError
from engine.frozen import frozen_of
from engine.objectives import make_objective
from engine.plan import peaks, planned
from engine.prediction import splits
from engine.recompute.ahead import flops_again
from engine.recompute.cut import Cut, Problem
from engine.recompute.offload import host_rate
from engine.recompute.save_sets import SAVE_SETS
from engine.recompute.solve import Infeasible
from engine.recompute.timing import LayerTimes
from engine.recompute_problem import Copies, Seconds, problems_of
from engine.step_time import timing_of
from parallel import comm
from parallel.grid import Grid, GridShape

_FLOPS = 1e12  # a second, where nobody knows
_FLOPS_PER_BYTE = 14_000  # that a GPU computes while it copies one to its host
_RUNS = 3  # of each kind of layer that is timed


class TooLittleError(ConfigError):
    """A budget that no save sets stay within.

    Attributes:
        smallest: bytes that the worst rank needs at least.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `choose` has found.

    Attributes:
        config: with a save set for each block and, if the stages are cut otherwise than without a budget, with the
            layers of each. budget: bytes that a rank may take. peaks: of each pipeline rank, as planned. seconds: of
            each, that a step computes again. busy: of each, that a step takes, that included. step: seconds by the same
            times, with the bubble (0 where `choose` knows none of forwards). pass_seconds, bubble: of all forwards and
            backwards of a step, as simulated, where times were measured.
    """

    config: Config
    budget: int
    peaks: tuple[int, ...]
    seconds: tuple[float, ...]
    busy: tuple[float, ...]
    step: float
    pass_seconds: float = 0.0
    bubble: float = 0.0

    def describe(self) -> str:
        """A line for the start-up report."""
        peaks = ", ".join(f"{peak / 2**20:,.1f}" for peak in self.peaks)
        seconds = ", ".join(f"{1e3 * s:,.1f}" for s in self.seconds)
        return (
            f"recompute: chosen within {self.budget / 2**20:,.1f} MiB per rank: {peaks} MiB planned, {seconds} ms of a "
            f"step computed again (by pipeline rank); forwards and backwards of a step {1e3 * self.pass_seconds:,.1f} "
            f"ms, bubble {100 * self.bubble:.1f} % (layers as timed at the start; messages, loss and optimizer apart)"
        )


def settled(config: Config, grid: Grid, device: torch.device, memory: float) -> tuple[Config, Choice | None]:
    """The configuration that a run has, with times measured on its devices, and what was chosen. Collective.

    What is chosen is chosen by the first rank, for all.

    Args:
        config: resolved. memory: bytes that this rank may count on; what goes by it goes by the least of all ranks.

    Raises:
        ConfigError: as `choose`.
    """
    if not config.recompute.is_auto:
        return config, None
    times = timing_of(config, grid, make_objective(config)).measured(device, _RUNS)
    least, choice = comm.least(memory, grid.world), None
    if grid.world.index == 0:
        rate = host_rate(device) if config.recompute.offload == "auto" else 0.0
        choice = _chosen(config, grid.shape, least, times, rate, on_cpu=device.type == "cpu")
    choice = comm.gather_objects(choice, grid.world)[0]
    if isinstance(choice, str):
        raise ConfigError(choice)
    return choice.config, choice


def _chosen(
    config: Config, shape: GridShape, memory: float, times: Mapping[str, LayerTimes], rate: float, *, on_cpu: bool
) -> Choice | str:
    """As `choose`, by measured times; the refusal as a text, which all ranks are to be told."""
    layers = make_objective(config).layers
    split = splits(config.pipeline(shape).schedule(config.num_micro_batches(shape)))
    passes = dict(zip((layer.name for layer in layers), frozen_of(config, layers).passes, strict=True))

    def seconds(layer: str, of: str) -> float:
        return times[layer].recompute_seconds(of)

    def copies(layer: str, count: int) -> float:
        return sum(times[layer].unhidden(count / rate, passes[layer], splits=split))

    try:
        choice = choose(
            config, shape, memory, seconds, on_cpu=on_cpu,
            passes=lambda layer: times[layer].seconds(passes[layer], splits=split), copies=copies,
        )  # fmt: skip
    except ConfigError as error:
        return str(error)
    timeline = planned(choice.config, shape, 0, memory, on_cpu=on_cpu).predict(times)
    return replace(choice, pass_seconds=timeline.makespan, bubble=timeline.bubble_fraction)


def check_budget(config: Config, shape: GridShape, memory: float, *, on_cpu: bool) -> None:
    """Raise TooLittleError where `choose` would whatever the times, before ranks talk."""
    if not config.recompute.is_auto:
        return
    problems, stages = problems_of(config, shape, memory, lambda layer, of: 0.0, on_cpu=on_cpu)
    lacks = list[Infeasible]()
    for problem in problems:
        try:
            if _cuts(config, shape):
                problem.check()
            else:
                problem.solved(stages)
        except Infeasible as error:
            lacks.append(error)
        else:
            return
    raise _refusal(config, problems[0].budget, memory, min(error.smallest for error in lacks)) from lacks[0]


def by_flops(config: Config) -> Seconds:
    """Times where there is no device: of products alone, at a rate that is the same for all."""
    layers, images = make_objective(config).layers, config.train.micro_batch_size or 1
    names = [layer.name for layer in layers]
    again = {
        name: dict(zip(names, flops_again(layers, dict.fromkeys(names, of), config.model), strict=True))
        for name, of in SAVE_SETS.items()
    }
    return lambda layer, name: again[name][layer] * images / _FLOPS


def copies_by_flops(config: Config) -> Copies:
    """The same of copies to host memory and back."""
    layers, images = make_objective(config).layers, config.train.micro_batch_size or 1
    flops = {layer.name: layer.flops * images for layer in layers}

    def copies(layer: str, count: int) -> float:
        return sum(max(0.0, count * _FLOPS_PER_BYTE - times * flops[layer]) for times in (1, 2)) / _FLOPS

    return copies


def passes_by_flops(config: Config) -> Callable[[str], float]:
    """The same of forward and backward."""
    layers, images = make_objective(config).layers, config.train.micro_batch_size or 1
    counts = zip(layers, frozen_of(config, layers).passes, strict=True)
    flops = {layer.name: layer.flops * count * images for layer, count in counts}
    return lambda layer: flops[layer] / _FLOPS


def choose(
    config: Config,
    shape: GridShape,
    memory: float,
    seconds: Seconds,
    *,
    on_cpu: bool,
    passes: Callable[[str], float] | None = None,
    copies: Copies | None = None,
) -> Choice:
    """Save sets for every block, and the layers of every stage.

    Args:
        config: resolved, with recompute.policy auto. memory: bytes of a rank's device, or of its share of a host.
            seconds: of computing again. on_cpu: as `engine.plan.plan_memory`. passes: seconds of forward and backward
            of a layer for a micro-batch, by its name; None: stages are as they are cut without budget. copies: to host
            memory, with recompute.offload auto.

    Raises:
        TooLittleError: no save sets keep all ranks within the budget.
    """
    problems, stages = problems_of(
        config, shape, memory, seconds, on_cpu=on_cpu, passes=passes or (lambda layer: 0.0),
        copies=copies or (lambda layer, count: 0.0),
    )  # fmt: skip
    cuts, lacks = list[tuple[Problem, Cut]](), list[Infeasible]()
    for each in problems:
        try:
            if passes is None or not _cuts(config, shape):
                cuts.append((each, each.solved(stages)))
            else:
                cuts.append((each, each.best_of(each.best(), stages)))
        except Infeasible as error:
            lacks.append(error)
    if not cuts:
        raise _refusal(config, problems[0].budget, memory, min(error.smallest for error in lacks)) from lacks[0]
    problem, found = min(cuts, key=lambda cut: cut[0].step(cut[1]))
    layers = make_objective(config).layers
    names = {
        layers[place].name: name
        for rank in found.ranks
        for stage, sets in rank.sets.items()
        for place, name in zip(found.stages[stage], sets, strict=True)
    }
    blocks = [layer.name for layer in layers if layer.kind == "blocks" and not layer.is_frozen]
    sets = tuple(names.get(block, "all") for block in blocks)
    config = _named(config, sets, found.stages if found.stages != stages else None)
    chosen, planned_peaks = _ahead_within(config, shape, memory, problem.budget, on_cpu=on_cpu)
    return Choice(
        config=chosen,
        budget=problem.budget,
        peaks=planned_peaks,
        seconds=tuple(solution.seconds for solution in found.ranks),
        busy=found.seconds,
        step=0.0 if passes is None else problem.step(found),
    )


def _cuts(config: Config, shape: GridShape) -> bool:
    """Whether the layers of stages are to be chosen, too."""
    return shape.pipeline > 1 and config.parallel.layers_per_stage is None


def _named(config: Config, sets: tuple[str, ...], stages: Sequence[range] | None) -> Config:
    config = replace(config, recompute=replace(config.recompute, policy=sets, memory_budget="auto", offload="never"))
    if stages is None:
        return config
    return replace(config, parallel=replace(config.parallel, layers_per_stage=tuple(map(len, stages))))


def _ahead_within(
    config: Config, shape: GridShape, memory: float, budget: int, *, on_cpu: bool
) -> tuple[Config, tuple[int, ...]]:
    """Recomputing ahead, unless what then lies recomputed is too much."""
    found = peaks(config, shape, memory, on_cpu=on_cpu)
    if max(found) > budget and config.recompute.ahead != "never":
        config = replace(config, recompute=replace(config.recompute, ahead="never"))
        found = peaks(config, shape, memory, on_cpu=on_cpu)
    return config, found


def _refusal(config: Config, budget: int, memory: float, least: int) -> TooLittleError:
    of = f", of {memory / 2**20:,.0f} MiB" if budget != memory else ""
    cures = [f"recompute.memory_budget {least}" if least <= memory else "devices with more memory"]
    if (size := config.train.micro_batch_size or 1) > 1:
        cures.append(f"train.micro_batch_size {divisors(size)[-2]}")
    if config.parallel.zero_stage < 3:
        cures.append(f"parallel.zero_stage {config.parallel.zero_stage + 1} with more data ranks")
    if config.parallel.layers_per_stage is not None:
        cures.append("another parallel.layers_per_stage, or none")
    return TooLittleError(
        f"recompute.memory_budget is {config.recompute.memory_budget} ({budget / 2**20:,.1f} MiB{of}), but with "
        f"everything computed again the fullest rank needs {least / 2**20:,.1f} MiB: give {', '.join(cures)}, or more "
        "ranks that split the layers",
        least,
    )
