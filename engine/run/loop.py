"""The loop over the steps of a run: train, evaluate, report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from data import Batch, Dataset, EvalStream, StepBatches, TrainStream
from engine.checkpoint.saver import Votes
from engine.device import peak_memory_bytes, peak_tflops, synchronise
from engine.errors import DivergedError
from engine.optimizers.schedules import factor
from engine.run.attention import AttentionLog
from engine.run.bad_samples import BadSamples
from engine.run.data_wait import Figures, Hints, Supply
from engine.run.decode_sharing import decode_sharing
from engine.run.finite import check_finite
from engine.run.metrics import MetricsWriter
from engine.run.predicted import Comparison
from engine.run.profile import StepProfiler
from engine.run.progress import Progress
from engine.run.prompts import prompt_batches
from engine.run.recomputed import recomputed_lines
from engine.run.replicas import check_before_saving, check_when_due
from engine.run.sample_relay import sample_relay
from engine.run.saving import Saving
from engine.run.step import Stepper, StepResult
from engine.run.stopping import StopRequests
from parallel import comm


@dataclass
class _Interval:
    """How long what happened since the last line took, in this attempt.

    Attributes:
        waited_before: seconds for data until then. steps: how many.
        paused: seconds for evaluation, saving and what records steps.
        bubbles: of the steps in which they were measured.
    """

    waited_before: float
    started: float = field(default_factory=lambda: time.perf_counter())
    steps: int = 0
    paused: float = 0.0
    bubbles: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """That training took."""
        return time.perf_counter() - self.started - self.paused


class Loop:
    """Steps, evaluations and their reports.

    Args:
        stepper: runs steps. train_set, eval_set: images. steps: of the whole run.
        writer: on rank 0 alone. profiler: traces some of the steps. saving: saves the state; None: never.
        progress: to go on from. requests: to stop early. comparison: of what was predicted with the first steps.
        attention: looks at what the model attends to; None: never.
    """

    def __init__(
        self,
        stepper: Stepper,
        train_set: Dataset,
        eval_set: Dataset,
        *,
        steps: int,
        writer: MetricsWriter | None,
        profiler: StepProfiler | None = None,
        saving: Saving | None = None,
        progress: Progress | None = None,
        requests: StopRequests | None = None,
        comparison: Comparison | None = None,
        attention: AttentionLog | None = None,
    ) -> None:
        self.stepper, self.steps, self.writer, self.profiler = stepper, steps, writer, profiler
        self.saving, self.progress, self.requests = saving, progress or Progress(), requests
        self._is_wanted = False  # that the run stops, by a vote
        self._recording_seconds = 0.0  # before and after steps that are recorded
        self._has_told_recomputed, self._comparison, self._attention = False, comparison, attention
        if saving is not None:
            stepper.before_change = saving.saver.before_change
        a = stepper.assembly
        self.config = a.config
        micro = a.config.train.micro_batch_size
        assert micro is not None
        place: dict[str, Any] = {
            "config": a.config.data,
            "micro_batch_size": micro,
            "data_rank": a.grid.data.index,
            "data_size": a.grid.data.size,
            "with_images": a.holds_images,
            "with_texts": a.holds_texts,
        }
        batch, done, relay = a.config.train.global_batch_size, self.progress, sample_relay(a)
        ways: dict[str, Any] = {"relay": relay, "pins": a.device.type == "cuda", "circle": decode_sharing(a, relay)}
        self.train_stream = TrainStream(
            train_set,
            global_batch_size=batch,
            seed=a.config.train.seed,
            offset=done.samples - done.step * batch,
            **ways,
            **place,
        )
        self._supply, self._hints = Supply(self.train_stream, a.grid.local_size), Hints(a.config.data.workers)
        self.eval_stream = EvalStream(eval_set, leaves_out=True, **ways, **place)
        self._bad = BadSamples(
            a,
            self.train_stream,
            self.eval_stream,
            decides=a.holds_images if relay is None else relay.decides,
            sizes=(len(train_set), len(eval_set)),
            progress=done,
            writer=writer,
        )
        self._prompts = prompt_batches(eval_set, **place)
        self.images_per_epoch = len(train_set) * a.config.data.repeats
        self._has_texts = train_set.texts is not None
        self.flops_per_image = a.training_flops
        self.tokens_per_sample = sum(l.output[0] for l in a.layers if l.kind == "embed" and not l.is_frozen)
        self.bubble_predicted = a.predicted.bubble_fraction if a.grid.pipeline.size > 1 else None
        self.evaluated: tuple[int, Mapping[str, float]] = (-1, {})

    def run(self) -> str | None:
        """The steps of the run that are left, with evaluations and saves between and after them.

        Returns:
            why it was stopped before the last step, None if it was not.
        """
        progress, began, where = self.progress, time.perf_counter(), self.stepper.assembly.grid.meter.where
        trained_before = progress.train_seconds
        interval = _Interval(self.train_stream.waited)
        first = self.steps + 1 if self._stops else progress.step + 1
        for step, batches in zip(range(first, self.steps + 1), self._batches(), strict=False):
            where.begin(step)
            before = time.perf_counter()
            lr, result = self._train(step, batches)
            took = time.perf_counter() - before
            self._compare(took)
            self._supply.after_step(took)
            interval.steps += 1
            interval.paused, self._recording_seconds = interval.paused + self._recording_seconds, 0.0
            interval.bubbles += [] if result.bubble is None else [result.bubble]
            self._tell_recomputed(result)
            last = step == self.steps
            if last or step % self.config.log.interval == 0:
                self._report(step, result, lr, interval)
                progress.begin_interval()
                interval = _Interval(self.train_stream.waited)
            pause = time.perf_counter()
            if self._attention is not None and (last or self._attention.is_due(step)):
                with where.during(phase="looking at attention"):
                    self._attention.look(step)
            every = self.config.train.eval_interval
            if last or (every and step % every == 0):
                with where.during(phase="evaluation"):
                    self.evaluated = step, self._evaluate(step)
                if last:
                    self._check_end(self.evaluated[1])
            progress.train_seconds = trained_before + time.perf_counter() - began
            stops = self._stops and not last
            if self.saving is not None and (last or stops or self.saving.is_due(step)):
                with where.during(phase="saving a checkpoint"):
                    self._save(self.saving)
            if stops:
                break
            interval.paused += time.perf_counter() - pause
        if self.profiler is not None:
            self.profiler.finish()
        if self.saving is not None:
            with where.during(phase="saving the last checkpoint"):
                self.saving.finish()
        self._bad.close()
        return self._reason()

    def replay(self, last: int) -> Iterator[tuple[int, float, StepResult]]:
        """Train up to step `last`, and nothing else: no evaluation, report or save.

        Yields:
            (step, loss that a line of metrics of this step would have, result) of each step.
        """
        progress, where = self.progress, self.stepper.assembly.grid.meter.where
        for step, batches in zip(range(progress.step + 1, last + 1), self._batches(), strict=False):
            where.begin(step)
            _, result = self._train(step, batches)
            loss = self._interval_loss(result)
            if step % self.config.log.interval == 0:
                progress.begin_interval()
            yield step, loss, result

    @property
    def _stops(self) -> bool:
        """Whether no other step is to be begun."""
        return self._is_wanted or (self.requests is not None and self.requests.is_at_end(self.progress.step))

    def _reason(self) -> str | None:
        if self.progress.step == self.steps or not self._stops:
            return None
        assert self.requests is not None
        if self._is_wanted:
            return self.requests.reason(self.stepper.assembly.grid.world)
        return f"train.stop_step {self.requests.stop_step}"

    def _batches(self) -> Iterator[StepBatches]:
        return self.train_stream.steps(self.progress.step)

    def _train(self, step: int, batches: StepBatches) -> tuple[float, StepResult]:
        """(learning rate, result) of a step."""
        self._record(StepProfiler.before, step)
        lr_factor = factor(self.config.schedule, self.stepper.assembly.optimizer.steps, self.steps)
        lr = self.config.optimizer.lr * lr_factor
        result = self.stepper.train_step(batches, lr, lr_factor, self._votes)
        self._record(StepProfiler.after, step)
        self._count(step, result)
        check_when_due(self.stepper.assembly, step)
        if self.writer is not None:
            self.writer.advance(result.loss)
        wants_stop, bad, *votes = result.votes
        self._is_wanted = wants_stop > 0
        self._bad.after_step(step, bad)
        if self.saving is not None:
            self.saving.after_step(step, Votes(*votes))
        return lr, result

    def _record(self, call: Callable[[StepProfiler, int], None], step: int) -> None:
        if self.profiler is not None:
            began = time.perf_counter()
            call(self.profiler, step)
            self._recording_seconds += time.perf_counter() - began

    def _tell_recomputed(self, result: StepResult) -> None:
        """Of the first step that was not run again to find out what is wrong with it."""
        recompute = self.stepper.assembly.recompute
        if result.bad and recompute is not None:
            recompute.ran_again.clear()
            recompute.offload.sent = 0
        if result.bad or self._has_told_recomputed:
            return
        self._has_told_recomputed = True
        for line in recomputed_lines(self.stepper.assembly):
            if self.writer is not None:
                self.writer.say(line)

    def _compare(self, seconds: float) -> None:
        """What was predicted with what steps take, once enough have been."""
        if self._comparison is None:
            return
        for line in self._comparison.after_step(seconds, self.stepper.assembly.grid):
            if self.writer is not None:
                self.writer.say(line)

    def _votes(self) -> Sequence[float]:
        """This rank's: whether to stop, bad samples, and of saving."""
        return (
            0.0 if self.requests is None else self.requests.vote(),
            self._bad.vote(),
            *(() if self.saving is None else self.saving.votes()),
        )

    def _save(self, saving: Saving) -> None:
        step, (evaluated_at, figures) = self.progress.step, self.evaluated
        check_before_saving(self.stepper.assembly, step)
        saving.save(step, self.progress.to_json(), figures if evaluated_at == step else {})

    def _count(self, step: int, result: StepResult) -> None:
        p = self.progress
        p.step, p.samples = step, p.samples + self.config.train.global_batch_size
        if not result.skipped:
            p.interval_losses.append(result.loss)
            p.interval_targets += [dict(result.targets)] if result.targets else []
            p.bad_in_a_row = 0
        p.skipped += result.skipped
        if result.culprit is not None and self.writer is not None:
            self.writer.say(f" step {step} skipped: {result.culprit}")
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "culprit": result.culprit}
            self.writer.write("bad_step", step, values)
        p.bad_in_a_row += result.bad
        if p.bad_in_a_row >= min(self.config.train.max_bad_steps, self.steps):
            raise DivergedError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; first: "
                f"{result.culprit}. {p.bad_in_a_row} steps in a row had to be skipped "
                "(train.max_bad_steps). Lower optimizer.lr, warm up longer, or check the data"
            )

    def _check_end(self, evaluated: Mapping[str, float]) -> None:
        """Raise DivergedError where what was trained is no model: bad steps too few to end the run may hide that."""
        check_finite(self.stepper.assembly, self.steps)
        for name, value in evaluated.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"step {self.steps}: the weights are finite, but the {name} of the evaluation is {value}. Lower "
                    "optimizer.lr, warm up longer, or check the data"
                )

    def _report(self, step: int, result: StepResult, lr: float, interval: _Interval) -> None:
        a, batch = self.stepper.assembly, self.config.train.global_batch_size
        synchronise(a.device)
        step_time = interval.seconds / interval.steps
        late = self.stepper.transfer.late() / interval.steps
        waited = (self.train_stream.waited - interval.waited_before) / interval.steps + late
        own = [[float(peak_memory_bytes(a.device)), waited, *self._supply.figures(late)]]
        of_ranks = comm.all_gather_rows(torch.tensor(own, dtype=torch.float64, device=a.device), a.grid.world).tolist()
        memory, waited = (max(of_rank[n] for of_rank in of_ranks) for n in range(2))
        supplies = [Figures(*of_rank[2:]) for of_rank in of_ranks]
        images_per_second = batch / step_time
        tflops = self.flops_per_image * images_per_second / a.grid.shape.world_size / 1e12
        peak = peak_tflops(a.device, self.config.precision.dtype)
        values = {
            "samples": self.progress.samples,
            "loss": self._interval_loss(result),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "skipped_steps": self.progress.skipped,
            "step_time": step_time,
            "images_per_second": images_per_second,
            "tokens_per_second": images_per_second * self.tokens_per_sample,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
            "peak_memory": int(memory),
            "epoch": self.progress.samples / self.images_per_epoch,
            "data_time": waited,
            "data_wait": 1e3 * waited,
            "data_work": 1e3 * max(of_rank.work for of_rank in supplies),
            "bubble": statistics.fmean(interval.bubbles) if interval.bubbles else None,
            "bubble_predicted": self.bubble_predicted,
        } | {**self._texts_cut(), **self._bad.counted()}
        for name in a.objective.targets:
            if found := [targets[name] for targets in self.progress.interval_targets if name in targets]:
                values[f"loss_{name}"] = statistics.fmean(found)
        if self.writer is not None:
            self.writer.train(step, values)
            if (hint := self._hints.of(supplies)) is not None:
                self.writer.say(hint)

    def _texts_cut(self) -> dict[str, int]:
        """How many texts were too long, in this attempt; nothing where there are none.

        Ranks that read the texts of one data rank count the same ones.
        """
        if not self._has_texts:
            return {}
        grid = self.stepper.assembly.grid
        counts = torch.zeros(grid.data.size, dtype=torch.float64, device=self.stepper.assembly.device)
        counts[grid.data.index] = self.train_stream.texts_cut
        return {"texts_cut": int(comm.all_reduce(counts, grid.world, "max").sum().item())}

    def _interval_loss(self, result: StepResult) -> float:
        """Mean since the last line of metrics, up to the step of this result."""
        return statistics.fmean(self.progress.interval_losses or [result.loss])

    def _held_out(self, step: int) -> Iterator[Batch]:
        """What is evaluated; too many bad samples end the run before there are figures of the rest, or of none."""
        yield from self.eval_stream
        self._bad.after_evaluation(step)
        yield from self._prompts

    def _evaluate(self, step: int) -> Mapping[str, float]:
        synchronise(self.stepper.assembly.device)
        began = time.perf_counter()
        result = self.stepper.evaluate(self._held_out(step))
        values = dict(result)
        if self.stepper.assembly.average is not None:
            averaged = self.stepper.evaluate_average(chain(self.eval_stream, self._prompts))
            values |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
            self.eval_stream.bad.clear()  # of which the pass before has told
        self.stepper.transfer.late()  # is no step's
        values |= {"epoch": self.progress.samples / self.images_per_epoch}
        if self.writer is not None:
            self.writer.evaluation(step, values | {"eval_time": time.perf_counter() - began})
        return result
