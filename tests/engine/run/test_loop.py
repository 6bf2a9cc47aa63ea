"""The loop: what is logged and evaluated when, and steps whose loss or gradient is not finite."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import pretrain_vit
from data import Batch, DataConfig, TrainStream
from data.captions import TemplateCaptions
from data.datasets import SyntheticDataset
from data.texts import Texts
from data.tokenizers import ByteTokenizer
from engine.assemble import assemble
from engine.config import Config, LogConfig, RecomputeConfig, TrainConfig
from engine.errors import EXIT_DIVERGED, EXIT_DONE, ConfigError, DivergedError
from engine.run.launch import run_rank
from engine.run.loop import Loop
from engine.run.step import Stepper, StepResult
from engine.run.trainer import pretrain
from parallel.grid import make_grid
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import flags, small

TRAIN_KEYS = [
    *("event", "step", "samples", "loss", "lr", "grad_norm", "loss_scale", "skipped_steps", "step_time"),
    *("images_per_second", "tokens_per_second", "tflops_per_device", "mfu", "peak_memory"),
    *("epoch", "data_time", "data_wait", "data_work", "bubble", "bubble_predicted", "wall_time"),
]


def lines(folder: Path, event: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def run(folder: Path, steps: int, interval: int, eval_interval: int) -> Config:
    train = TrainConfig(steps=steps, global_batch_size=8, eval_interval=eval_interval)
    config = small(train=train, log=LogConfig(interval=interval, tensorboard=False), run_dir=str(folder))
    pretrain(config, World())
    return config


def test_metrics_have_the_promised_keys_and_the_configuration_is_kept(tmp_path: Path) -> None:
    config = run(tmp_path, steps=3, interval=1, eval_interval=0)
    train, evaluation = lines(tmp_path, "train"), lines(tmp_path, "eval")
    assert [list(line) for line in train] == [TRAIN_KEYS] * 3
    assert [list(line) for line in evaluation] == [
        ["event", "step", "loss", "accuracy", "images", "epoch", "eval_time", "wall_time"]
    ]
    assert [line["samples"] for line in train] == [8, 16, 24]
    assert all(line["mfu"] is None and line["loss_scale"] == 1.0 for line in train)
    assert all(line["peak_memory"] > 2**20 and line["skipped_steps"] == 0 for line in train)
    for line in train:
        assert line["images_per_second"] == pytest.approx(8 / line["step_time"])
        assert line["tokens_per_second"] == pytest.approx(4 * line["images_per_second"])
    assert evaluation[0]["images"] == 8 and 0 <= evaluation[0]["accuracy"] <= 1
    assert [line["epoch"] for line in train] == [8 / 32, 16 / 32, 24 / 32]
    assert all(0 <= line["data_time"] <= line["step_time"] for line in train)
    assert all(line["bubble"] is line["bubble_predicted"] is None for line in train), "there is no pipeline"
    times = [line["wall_time"] for line in train + evaluation]
    assert times == sorted(times) and 0 <= time.time() - times[-1] < 600
    assert 0 < evaluation[0]["eval_time"] < 600
    assert (tmp_path / "config.yaml").read_text().endswith(config.resolve(1).to_yaml(config))


@pytest.mark.parametrize(
    ("steps", "interval", "eval_interval", "logged", "evaluated"),
    [
        (7, 3, 2, [3, 6, 7], [2, 4, 6, 7]),
        (6, 3, 0, [3, 6], [6]),
        (6, 100, 3, [6], [3, 6]),
        (1, 10, 100, [1], [1]),
    ],
)
def test_intervals_and_the_last_step(
    tmp_path: Path, steps: int, interval: int, eval_interval: int, logged: list[int], evaluated: list[int]
) -> None:
    run(tmp_path, steps, interval, eval_interval)
    assert [line["step"] for line in lines(tmp_path, "train")] == logged
    assert [line["step"] for line in lines(tmp_path, "eval")] == evaluated


def test_the_logged_loss_is_the_mean_of_the_interval_across_evaluations(tmp_path: Path) -> None:
    run(tmp_path / "each", steps=5, interval=1, eval_interval=0)
    run(tmp_path / "some", steps=5, interval=3, eval_interval=2)
    each = [line["loss"] for line in lines(tmp_path / "each", "train")]
    some = [line["loss"] for line in lines(tmp_path / "some", "train")]
    assert some == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 2], rel=1e-12)


def test_skipped_steps_and_evaluations_have_no_part_in_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], []
    monkeypatch.setattr("engine.run.loop.time.perf_counter", lambda: clock[0])
    tested = loop([False] * 4, eval_interval=2)
    results = [StepResult(loss, 1.0, skipped=loss != loss) for loss in (1.0, 2.0, float("nan"), 6.0)]

    def train_step(*_: object) -> StepResult:
        clock[0] += 1.0
        return replace(results.pop(0), votes=(0.0, 0.0))

    def evaluate(_: object) -> dict[str, float]:
        clock[0] += 100.0
        return {"loss": 0.0}

    monkeypatch.setattr(tested.stepper, "train_step", train_step)
    monkeypatch.setattr(tested.stepper, "evaluate", evaluate)
    writer = Mock()
    writer.train = lambda step, values: written.append(values)
    tested.writer = writer
    tested.run()
    assert [(line["loss"], line["step_time"]) for line in written] == [(3.0, 1.0)]
    assert [call.args[1]["eval_time"] for call in writer.evaluation.call_args_list] == [100.0, 100.0]


class Slow(SyntheticDataset):
    """Takes 20 ms to read."""

    def read(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.02)
        return super().read(*args, **kwargs)


def test_time_spent_waiting_for_images_is_told_per_step() -> None:
    place: dict[str, Any] = {"first": 0, "image_shape": (1, 8, 8), "num_classes": 10, "seed": 0}
    writer = Mock()
    images = Slow(size=32, **place)
    Loop(stepper(), images, SyntheticDataset(size=8, **place), steps=12, writer=writer).run()
    lines = [call.args[1] for call in writer.train.call_args_list]
    assert len(lines) == 2 and all(
        0.02 <= line["data_time"] <= line["step_time"] and line["data_wait"] == 1e3 * line["data_time"]
        for line in lines
    )


def test_texts_that_are_too_long_are_counted() -> None:
    place: dict[str, Any] = {"image_shape": (1, 8, 8), "num_classes": 10, "seed": 0}
    images = SyntheticDataset(first=0, size=32, **place)
    images.texts = Texts(tokenizer=ByteTokenizer(), length=3)
    images.captions = TemplateCaptions(names=("a", "bc") * 5, templates=("{class}",), class_prompts=("{class}",))
    writer = Mock()
    tested = Loop(stepper(), images, SyntheticDataset(first=32, size=8, **place), steps=9, writer=writer)
    tested.train_stream = TrainStream(
        images, config=DataConfig(), global_batch_size=8, micro_batch_size=8, data_rank=0, data_size=1, seed=0
    )
    tested.run()
    counted = writer.train.call_args_list[-1].args[1]["texts_cut"]
    drawn = tested.train_stream._order.indices(np.arange(72))
    assert counted == int((images.labels[drawn] % 2).sum()) > 0


def test_what_is_written_where_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(run_dir=str(tmp_path), log__tensorboard="true", recompute__policy="full", train__steps="3")
    assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DONE
    shown = capsys.readouterr().out
    for written in ("config.yaml", "metrics.jsonl"):
        assert str(tmp_path / written) in shown and (tmp_path / written).exists()
    assert f"TensorBoard {tmp_path}" in shown and list(tmp_path.glob("events.out.tfevents*"))
    assert "grid: pipeline 1 x data 1 x context 1 x tensor 1" in shown  # the start-up report
    assert "recompute: stage 0: 4 block(s) keep input\n" in shown
    assert "recompute: per micro-batch again on pipeline rank 0: " in shown and "warning: recompute" not in shown
    planned = re.search(r"recompute: ([\d.]+) MiB planned \(by pipeline rank\)\n", shown)
    assert planned is not None
    line = rf"recompute: planned {planned[1]} MiB, measured [\d.]+ in tensors of 64 KiB .*rank\); whole steps [\d.]+ ms"
    assert re.search(line, shown)


def test_a_policy_that_has_nothing_to_drop_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = flags(run_dir=str(tmp_path), recompute__policy="all+gather")
    assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DONE
    shown = capsys.readouterr().out
    assert "no effect: recompute.policy ...+gather: " in shown
    assert "warning: recompute: nothing was computed again on pipeline rank 0" in shown


def test_what_was_planned_is_told_beside_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = flags(run_dir=str(tmp_path), recompute__policy="auto", train__steps="3")
    assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DONE
    shown = capsys.readouterr().out
    planned = re.search(
        r"recompute: chosen within [\d,.]+ MiB per rank: ([\d.]+) MiB planned, .*; forwards and ", shown
    )
    assert planned is not None
    assert re.search(
        rf"recompute: planned {planned[1]} MiB, measured [\d.]+ in tensors of 64 KiB .* whole steps [\d.]+", shown
    )


# -- steps that are not finite -----------------------------------------------------------------------------------------


def stepper(world: World | None = None, recompute: str = "none", **train: Any) -> Stepper:
    world, policy = world or World(), RecomputeConfig(policy=recompute)
    train = {"steps": 9, "global_batch_size": 8, **train}
    config = small(train=TrainConfig(**train), recompute=policy).resolve(world.size)
    grid = make_grid(config.grid_shape(world.size), world)
    return Stepper(assemble(config, grid, torch.device("cpu")))


def batches(images: float | None = None, seed: int = 0, size: int = 8) -> list[Batch]:
    """One micro-batch; `images`: one pixel's value."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(size, 1, 8, 8, generator=generator)
    if images is not None:
        pixels[size // 2, 0, 3, 3] = images
    labels = torch.arange(size) % 10
    return [Batch(images=pixels, labels=labels, sample_ids=torch.arange(size), weights=torch.ones(size))]


def state(s: Stepper) -> dict[str, Any]:
    weights = {name: p.detach().clone() for name, p in s.assembly.parameters().items()}
    optimizer = s.assembly.optimizer
    return {"weights": weights, "optimizer": copy.deepcopy(optimizer.state_tensors()), "steps": optimizer.steps}


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_bit_for_bit(poison: float, first: bool) -> None:
    disturbed, calm = stepper(), stepper()
    before = [] if first else [batches(seed=1)]
    for good in before:
        assert not disturbed.train_step(good, 1e-3).skipped
        calm.train_step(good, 1e-3)
    kept = state(disturbed)
    for _ in range(2):
        result = disturbed.train_step(batches(poison), 1e-3)
        assert result.skipped and not torch.isfinite(torch.tensor([result.loss, result.grad_norm])).all()
        assert_same(state(disturbed), kept)
    # nothing of it is left in the gradient buffer either: the next step is that of a run that never saw it
    assert disturbed.train_step(batches(seed=2), 1e-3) == calm.train_step(batches(seed=2), 1e-3)
    assert_same(state(disturbed), state(calm))


def _one_rank_is_poisoned(world: World) -> tuple[bool, bool, float]:
    s = stepper(world)
    kept = state(s)
    result = s.train_step(batches(float("nan") if world.rank == 1 else None, size=4), 1e-3)
    assert_same(state(s), kept)
    return result.skipped, s.train_step(batches(seed=3, size=4), 1e-3).skipped, result.loss


def test_all_ranks_skip_a_step_that_one_of_them_cannot_take() -> None:
    for skipped, next_skipped, loss in run_ranks(2, _one_rank_is_poisoned):
        assert skipped and not next_skipped and loss != loss  # NaN on each


class Poisoned(SyntheticDataset):
    """NaN in every image that is first read while `bad` says so, and whenever it is read again, as for diagnosis."""

    bad: Iterator[bool]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.known: dict[bytes, bool] = {}

    def read(self, indices: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        images, key = super().read(indices, *args, **kwargs), indices.tobytes()
        if key not in self.known:
            self.known[key] = next(self.bad, False)
        return images * float("nan") if self.known[key] else images


def loop(bad: list[bool], **train: Any) -> Loop:
    s = stepper(**train)
    place: dict[str, Any] = {"first": 0, "image_shape": (1, 8, 8), "num_classes": 10, "seed": 0}
    images = Poisoned(size=32, **place)
    images.bad = iter(bad)
    return Loop(s, images, SyntheticDataset(size=8, **place), steps=len(bad), writer=None)


def test_bad_steps_are_counted_and_a_good_one_starts_the_count_anew() -> None:
    bad = [True, True, False, True, True, False]
    patient = loop(bad, max_bad_steps=3)
    patient.run()
    assert (patient.progress.skipped, patient.progress.bad_in_a_row) == (4, 0)


def test_what_is_computed_again_is_counted_in_the_first_step_that_was_not_run_twice() -> None:
    tested = loop([True, False, False], recompute="norm")
    tested.writer = writer = Mock()
    tested.run()
    told = [call.args[0] for call in writer.say.call_args_list if call.args[0].startswith("recompute")]
    assert len(told) == 1 and "12 region(s) (norm 8, activation 4)" in told[0]  # of 4 blocks


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    impatient = loop([False, True, True, True, False], max_bad_steps=3)
    with pytest.raises(DivergedError, match=r"step 4: loss nan.*3 steps in a row.*max_bad_steps.*Lower optimizer.lr"):
        impatient.run()


def test_divergence_has_an_exit_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a rate this high makes weights overflow to Inf, and every later loss NaN
    argv = flags(run_dir=str(tmp_path), train__steps="50", optimizer__lr="1e38", optimizer__clip_grad="0")
    argv += ["--log.interval", "1", "--schedule.name", "constant", "--train.max_bad_steps", "3"]
    assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DIVERGED == 4
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("pretrain_vit.py: training diverged: step ")
    written = lines(tmp_path, "train")
    assert written[-1]["loss"] is None and written[-1]["skipped_steps"] >= 1


def test_chosen_steps_are_traced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small(
        run_dir=str(tmp_path),
        train=TrainConfig(steps=3, global_batch_size=8),
        log=LogConfig(tensorboard=False, profile_steps=(2, 3)),
    )
    pretrain(config, World())
    events = json.loads((tmp_path / "profile" / "rank0.json").read_text())["traceEvents"]
    updates = [e for e in events if e.get("name") == "vitruvius::adamw" and e.get("cat") == "user_annotation"]
    assert len(updates) == 1, "the first of them alone: torch's profiler slows what it watches"
    told = json.loads((tmp_path / "profile" / "timeline.json").read_text())["otherData"]
    assert told["steps"] == [2, 3] and told["steps_slowed_by_torch_profiler"] == [2]
    assert "profiler_start" not in capfd.readouterr().err or torch.cuda.is_available()


def test_steps_beyond_the_run_cannot_be_traced(tmp_path: Path) -> None:
    config = small(run_dir=str(tmp_path), log=LogConfig(tensorboard=False, profile_steps=(1, 2)))
    with pytest.raises(ConfigError, match=r"log.profile_steps \[1, 2\] reaches beyond the 1 steps"):
        pretrain(config, World())


def test_the_schedule_reaches_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(train=TrainConfig(steps=4, global_batch_size=8), run_dir=str(tmp_path))
    config = replace(config, log=LogConfig(interval=1, tensorboard=False))
    config = replace(config, schedule=replace(config.schedule, name="wsd", warmup_steps=2, cooldown_steps=1))
    pretrain(config, World())
    assert [line["lr"] for line in lines(tmp_path, "train")] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    s, taken = stepper(), []
    monkeypatch.setattr(s.assembly.optimizer, "update", lambda **given: taken.append(given["lr"]))
    for lr in (0.1, 0.2):
        s.train_step(list(islice(batches(), 1)), lr)
    assert taken == [0.1, 0.2]
