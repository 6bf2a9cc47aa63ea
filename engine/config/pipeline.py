"""The pipeline that a configuration asks for: its schedule, and whether there are layers to fill its stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from engine.config.limits import divisors
from engine.errors import ConfigError
from parallel.config import ParallelConfig
from parallel.pipeline import Schedule, build_schedule
from parallel.pipeline.readiness import check_lanes
from parallel.pipeline.schedule_file import fingerprint, is_schedule_file, read_schedule
from parallel.pipeline.schedules import SCHEDULES, virtual_stages_of


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What is known of a pipeline before there are micro-batches.

    On one rank there is nothing to schedule: it has one stage, whatever `parallel.schedule` says. A file that it names
    must be there all the same, as whoever names one that is not has made a mistake.

    Attributes:
        parallel: the configuration's. ranks: of the pipeline axis. num_stages: that the layers are cut into.
        written: the schedule of a file, where it is one.
        forwards_first: whether all forwards of a step come before its backwards where one rank could do either.
    """

    parallel: ParallelConfig
    ranks: int
    num_stages: int
    written: Schedule | None = None
    forwards_first: bool = False

    @staticmethod
    def of(parallel: ParallelConfig, ranks: int) -> Pipeline:
        """That of a configuration. Raises ConfigError where its schedule is not one of so many ranks."""
        name, virtual_stages = parallel.schedule, parallel.virtual_stages
        if not is_schedule_file(name):
            stages = ranks * virtual_stages_of(name, virtual_stages) if ranks > 1 else 1
            return Pipeline(parallel=parallel, ranks=ranks, num_stages=stages)
        try:
            if ranks == 1:
                fingerprint(name)
                return Pipeline(parallel=parallel, ranks=1, num_stages=1)
            written = read_schedule(name, ranks, None, virtual_stages)
            if parallel.schedule_policy == "ready":
                check_lanes(written)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return Pipeline(parallel=parallel, ranks=ranks, num_stages=written.num_stages, written=written)

    @property
    def micro_batches(self) -> int | None:
        """Per step, where the schedule is a file, which is for so many alone."""
        return None if self.written is None else self.written.num_micro_batches

    @property
    def pieces(self) -> int:
        """Micro-batches that a data rank's images are cut into unless the user says of what size."""
        return self.micro_batches or self.ranks

    def micro_batch_size(self, batch: int, given: int | None, data: int) -> int:
        """Images of a micro-batch.

        Args:
            batch: images of a step. given: the size that the user wants, or None. data: ranks that they are dealt to.

        Raises:
            ConfigError: they cannot be dealt so.
        """
        per_rank, rest = divmod(batch, data)
        if rest or per_rank % (given or self.pieces):
            raise self._undealt(batch, given, data)
        count = per_rank // given if given else self.pieces
        if self.micro_batches not in (None, count):
            assert given is not None and self.micro_batches is not None
            raise ConfigError(
                f"parallel.schedule {self.parallel.schedule} is for {self.micro_batches} micro-batches, but "
                f"train.global_batch_size {batch} on {data} data-parallel ranks is {count} of train.micro_batch_size "
                f"{given}: leave that out, or use a global batch of {self.micro_batches * given * data}"
            )
        return per_rank // count

    def _undealt(self, batch: int, given: int | None, data: int) -> ConfigError:
        unit = data * (given or self.pieces)
        near = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
        each = f"that {self.parallel.schedule} is for" if self.micro_batches else "one per pipeline rank"
        dealt = f"micro-batches of {given}" if given else f"{self.pieces} micro-batches, {each}"
        fits = [] if batch % data or self.micro_batches else divisors(batch // data)
        cure = f", or a train.micro_batch_size among {', '.join(map(str, fits))}" if fits else ""
        return ConfigError(
            f"train.global_batch_size {batch} cannot be dealt to {data} data-parallel ranks in {dealt}: "
            f"use a global batch of {' or '.join(map(str, near))}{cure}"
        )

    def schedule(self, num_micro_batches: int) -> Schedule:
        """That of a training step."""
        if self.ranks == 1:
            return build_schedule("gpipe" if self.forwards_first else "1f1b", 1, num_micro_batches)
        if self.written is not None:
            assert self.micro_batches == num_micro_batches, (self.micro_batches, num_micro_batches)
            return self.written
        p = self.parallel
        return _built(p.schedule, self.ranks, num_micro_batches, p.virtual_stages)

    def check_layers(self, layers: int, what: str, deeper: str = "a deeper model") -> None:
        """Raise ConfigError where the list of layers is shorter than that of the stages, or not cut as was asked for.

        Args:
            layers: how many. what: they are. deeper: what would have more.
        """
        of_model = f"the {layers} layers of {what}"
        if self.num_stages > layers:
            asked, cure = self._too_many(layers)
            raise ConfigError(f"{asked} more than {of_model}: use {cure}, or {deeper}")
        self._check_cut(layers, of_model)

    def _check_cut(self, layers: int, of_model: str) -> None:
        """Raise ConfigError where parallel.layers_per_stage is not a cut of so many layers into these stages."""
        given = self.parallel.layers_per_stage
        if given is None or self.ranks == 1:
            return
        what, even = f"parallel.layers_per_stage {list(given)}", divmod(layers, self.num_stages)
        example = [even[0] + (stage < even[1]) for stage in range(self.num_stages)]
        if len(given) != self.num_stages:
            raise ConfigError(
                f"{what} is for {len(given)} stages, but the pipeline has {self.num_stages}: give a number for each of "
                f"them, such as {example}, or leave it out"
            )
        if sum(given) != layers:
            raise ConfigError(
                f"{what} has {sum(given)} layers, which are not {of_model}: give numbers that add up to {layers}, such "
                f"as {example}, or leave it out"
            )

    def check_recomputes(self, *, drops: bool) -> None:
        """Raise ConfigError where a schedule from a file computes again (R) what nobody drops."""
        found = () if self.written is None or drops else self.written.recomputes
        if found:
            raise ConfigError(
                f"parallel.schedule {self.parallel.schedule} has recomputes ({found[0]} and so on), but nothing is "
                "dropped: set recompute.policy, or leave them out"
            )

    def _too_many(self, layers: int) -> tuple[str, str]:
        """Who asks for so many stages, and what asks for no more than there are layers."""
        name, size = self.parallel.schedule, f"parallel.pipeline_parallel_size {self.ranks}"
        if self.micro_batches is not None:
            return f"parallel.schedule {name} is for {self.num_stages} stages,", f"a file of at most {layers} stages"
        each = self.num_stages // self.ranks
        if each == 1:
            return f"{size} is", f"at most {layers} stages"
        cures = [f"a pipeline of at most {layers // each} ranks"] if layers // each > 1 else []
        if not SCHEDULES[name].is_fixed and layers // self.ranks > 1:
            cures.append(f"at most {layers // self.ranks} parallel.virtual_stages")
        if self.ranks <= layers:
            cures.append("a schedule of one stage per rank, such as 1f1b or zb_h1")
        what = f"{size} with {each} stages per rank (parallel.schedule {name}) is {self.num_stages} stages,"
        return what, ", or ".join(cures) or "fewer ranks"


@lru_cache(maxsize=4)
def _built(name: str, ranks: int, micro_batches: int, virtual_stages: int | None) -> Schedule:
    """Long ones take a second, and a plan asks for the same one many times."""
    return build_schedule(name, ranks, micro_batches, virtual_stages)
