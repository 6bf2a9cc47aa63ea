"""What a layout takes, with its save sets: time and memory as a run has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine.config import Config
from engine.recompute.assignment import assignment
from engine.recompute_choice import Choice, TooLittleError, choose
from parallel.pipeline.schedules import virtual_stages_of
from tools.plan.bounds import Bounds, Misfit
from tools.plan.layouts import Layout
from tools.plan.prices import shape_of, splits_backward


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one layout.

    Attributes:
        config: resolved, with a save set for each block. parts: seconds by what, as of StepTime. peaks: planned bytes
            of each pipeline rank.
    """

    layout: Layout
    config: Config
    seconds: float
    parts: Mapping[str, float]
    images_per_second: float
    mfu: float | None
    peaks: tuple[int, ...]

    @property
    def peak(self) -> int:
        """Of the fullest rank."""
        return max(self.peaks)


@dataclass
class Evaluator(Bounds):
    """Of the layouts of a configuration on ranks of a cluster."""

    _known: dict[tuple[Layout, bool], list[tuple[int, Prediction | Misfit]]] = field(default_factory=dict)

    def exactly(self, layout: Layout, budget: int | None = None, *, cuts: bool = False) -> Prediction | Misfit:
        """With the save sets that take the least time within the budget.

        Args:
            cuts: whether the layers of stages are found together with them, which takes longer; else they are as they
                are cut without a budget.
        """
        budget = budget or self.budget
        for before, found in self._known.get((layout, cuts), ()):
            if before >= budget and (found.least > budget if isinstance(found, Misfit) else found.peak <= budget):
                return found
        found = self._exactly(layout, budget, cuts)
        self._known.setdefault((layout, cuts), []).append((budget, found))
        return found

    def cut(self, found: Prediction, *, several: bool = False) -> Prediction:
        """The same, or, if that is quicker, with layers cut into stages together with the save sets.

        Args:
            several: where ranks have several stages, too, which takes many seconds.
        """
        layout = found.layout
        if layout.pipeline == 1 or (not several and virtual_stages_of(layout.schedule, layout.virtual) > 1):
            return found
        other = self.exactly(layout, cuts=True)
        return other if isinstance(other, Prediction) and other.seconds < found.seconds else found

    def _exactly(self, layout: Layout, budget: int, cuts: bool) -> Prediction | Misfit:
        self.counts["solved"] += 1
        model, config = self._priced(layout), self._resolved(layout)
        small = self._few(layout, config)
        small = replace(small, recompute=replace(config.recompute, memory_budget=budget))
        counts = dict(zip((layer.name for layer in model.layers), model.frozen.passes, strict=True))
        splits, on_cpu = splits_backward(layout), self.cluster.device_type == "cpu"

        def seconds(layer: str, of: str) -> float:
            return model.times[layer].recompute_seconds(of)

        def passes(layer: str) -> float:
            return model.times[layer].seconds(counts[layer], splits=splits)

        def copies(layer: str, count: int) -> float:
            return sum(model.times[layer].unhidden(self.cluster.to_host(count), counts[layer], splits=splits))

        try:
            choice: Choice = choose(
                small, shape_of(layout), self.memory, seconds, on_cpu=on_cpu, passes=passes if cuts else None,
                copies=copies,
            )  # fmt: skip
        except TooLittleError as error:
            return Misfit(layout=layout, least=error.smallest)
        cut = choice.config.parallel.layers_per_stage
        config = replace(
            config,
            recompute=choice.config.recompute,
            parallel=replace(config.parallel, layers_per_stage=cut),
        )
        sets = {name: of.name for name, of in assignment(config.recompute, model.layers, model.frozen.passes).items()}
        step = self._step(replace(model, config=config), layout, sets)
        return Prediction(
            layout=layout,
            config=config,
            seconds=step.seconds,
            parts=step.parts,
            images_per_second=config.train.global_batch_size / step.seconds,
            mfu=step.mfu_of(self),
            peaks=choice.peaks,
        )
