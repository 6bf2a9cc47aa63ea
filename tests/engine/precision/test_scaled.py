"""Steps that are not finite, under fp16 and bf16: what is skipped, what is left as it was, what is told.

An overflow is planted in one rank's gradient alone; every rank of every layout must then do the same.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pretrain_vit
from data import Batch
from data.datasets import SyntheticDataset
from engine.assemble import assemble
from engine.assembly import Assembly
from engine.config import Config, OptimizerConfig, PrecisionConfig, TrainConfig
from engine.errors import EXIT_DIVERGED, EXIT_DONE
from engine.run.launch import run_rank
from engine.run.loop import Loop
from engine.run.metrics import MetricsWriter
from engine.run.step import Stepper
from model import MicroBatch
from parallel.config import ParallelConfig
from parallel.grid import make_grid
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.run.test_loop import Poisoned
from tests.engine.small import flags, small

# -- the trace ---------------------------------------------------------------------------------------------------------

FP16 = PrecisionConfig(dtype="fp16", initial_loss_scale=1024.0, loss_scale_window=3, hysteresis=2)
# an overflow that the hysteresis forgives, one that halves, one at once after it; a window of three, which gives the
# hysteresis back; one that is forgiven again; a window more
SCRIPT = ".X.XX...X...."
SCALES = [1024, 1024, 1024, 1024, 512, 256, 256, 256, 512, 512, 512, 512, 1024]  # that each step was taken with
STEPS_DONE = [1, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8, 9]  # updates, after each step

LAYOUTS = {
    # of one rank or two: the layout, the rank whose gradient overflows, and in which parameter
    "one process": ({}, 0, "blocks.1.norm1.weight"),
    "data": ({}, 1, "blocks.1.norm1.weight"),
    "tensor": ({"tensor_parallel_size": 2}, 1, "blocks.1.norm1.weight"),
    "first stage": ({"pipeline_parallel_size": 2}, 0, "blocks.0.norm1.weight"),
    "last stage": ({"pipeline_parallel_size": 2}, 1, "head.norm.weight"),
    "context": ({"context_parallel_size": 2}, 1, "blocks.1.norm1.weight"),
    "sharded": ({"zero_stage": 3, "bucket_mib": 0.001}, 1, "blocks.1.norm1.weight"),
}  # fmt: skip


def config_of(layout: str, world: int) -> Config:
    parallel = ParallelConfig(**LAYOUTS[layout][0])
    train = TrainConfig(steps=len(SCRIPT), global_batch_size=8)
    optimizer = OptimizerConfig(ema_decay=0.9)
    return small(parallel=parallel, train=train, optimizer=optimizer, precision=FP16).resolve(world)


def batches_of(stepper: Stepper, step: int) -> list[Batch]:
    """This data rank's micro-batches of random images."""
    a = stepper.assembly
    micro, count, sizes = a.config.train.micro_batch_size, a.schedule.num_micro_batches, a.config.model.sizes
    assert micro is not None
    found = []
    for m in range(count):
        first = (a.grid.data.index * count + m) * micro
        generator = torch.Generator().manual_seed(1000 * step + first)
        shape = (micro, sizes.channels, *sizes.image)
        images = torch.rand(shape, generator=generator) if a.holds_images else None
        labels, ids = torch.arange(first, first + micro) % 10, torch.arange(first, first + micro)
        found.append(Batch(images=images, labels=labels, sample_ids=ids, weights=torch.ones(micro)))
    return found


def kept(stepper: Stepper) -> list[Tensor]:
    """All that an update changes on this rank, copied."""
    a = stepper.assembly
    assert a.average is not None
    of_buckets = [(bucket.master, bucket.weights) for bucket in a.store.buckets]
    state = list(chain(*a.optimizer.state_tensors().values()))
    return [t.clone() for t in chain(*of_buckets, state, a.average.averages)]


def trace(world: World, layout: str) -> dict[str, Any]:
    """The script's steps as this rank sees them."""
    config = config_of(layout, world.size)
    grid = make_grid(config.grid_shape(world.size), world)
    stepper = Stepper(assemble(config, grid, torch.device("cpu")))
    _, rank, name = LAYOUTS[layout]
    now = 0
    if world.rank == rank:
        parameter = stepper.assembly.parameters()[name]
        parameter.register_hook(lambda grad: grad * float("inf") if SCRIPT[now] == "X" else grad)
    out: dict[str, Any] = {"scales": [], "skipped": "", "steps": [], "changed": "", "bad": False}
    for now in range(len(SCRIPT)):
        before = kept(stepper)
        result = stepper.train_step(batches_of(stepper, now), 1e-3)
        same = [torch.equal(a, b) for a, b in zip(before, kept(stepper), strict=True)]
        out["scales"].append(result.loss_scale)
        out["skipped"] += "X" if result.skipped else "."
        out["steps"].append(stepper.assembly.optimizer.steps)
        out["changed"] += "X" if all(same) else "." if not any(same) else "?"
        out["bad"] |= result.bad
    grid.close()
    return out


EXPECTED = {"scales": SCALES, "skipped": SCRIPT, "steps": STEPS_DONE, "changed": SCRIPT, "bad": False}


def traces(world: World, layouts: list[str]) -> dict[str, dict[str, Any]]:
    return {layout: trace(world, layout) for layout in layouts}


def test_the_trace_of_one_process() -> None:
    assert trace(World(), "one process") == EXPECTED


@pytest.mark.slow
def test_the_trace_of_two_ranks_of_which_one_overflows() -> None:
    layouts = [layout for layout in LAYOUTS if layout != "one process"]
    for found in run_ranks(2, traces, layouts, timeout=240):
        assert found == dict.fromkeys(layouts, EXPECTED)


# -- what a run does and tells -----------------------------------------------------------------------------------------


def lines(folder: Path, event: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def run(folder: Path, steps: int, **keys: str) -> int:
    argv = flags(run_dir=str(folder), train__steps=str(steps), log__interval="1", **keys)
    return run_rank(pretrain_vit.main, argv, "pretrain_vit.py")


def test_a_loss_scale_that_is_too_high_comes_down_and_the_run_goes_on(tmp_path: Path) -> None:
    """However few bad steps are allowed: overflows above the least scale are none."""
    scaled = {"precision__dtype": "fp16", "precision__initial_loss_scale": str(2.0**32), "precision__hysteresis": "1"}
    assert run(tmp_path, 30, train__max_bad_steps="1", **scaled) == EXIT_DONE
    train = lines(tmp_path, "train")
    skipped = [line["skipped_steps"] for line in train]
    assert skipped[:5] == [1, 2, 3, 4, 5] and skipped[-1] < 25 and train[-1]["loss"] is not None
    assert [line["loss_scale"] for line in train] == [2.0 ** (32 - before) for before in [0, *skipped[:-1]]]
    assert lines(tmp_path, "bad_step") == []


def test_skipped_steps_take_nothing_of_the_schedule(tmp_path: Path) -> None:
    """The n-th update has the rate of the n-th step of a run that skips none."""
    warm = {"schedule__name": "wsd", "schedule__warmup_steps": "20", "schedule__cooldown_steps": "5"}
    keys = {"precision__initial_loss_scale": str(2.0**32), "precision__hysteresis": "1", "optimizer__lr": "1e-3"}
    assert run(tmp_path, 40, precision__dtype="fp16", **keys, **warm) == EXIT_DONE
    train = lines(tmp_path, "train")
    assert train[-1]["skipped_steps"] >= 5
    for before, line in zip([{"skipped_steps": 0}, *train[:-1]], train, strict=True):
        updates = line["step"] - 1 - before["skipped_steps"]
        assert line["lr"] == pytest.approx(1e-3 * min(1, (updates + 1) / 20)), line


def test_overflows_at_the_least_loss_scale_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"precision__initial_loss_scale": str(2.0**31), "precision__min_loss_scale": str(2.0**30)}
    code = run(tmp_path, 30, precision__dtype="fp16", precision__hysteresis="1", train__max_bad_steps="3", **limits)
    assert code == EXIT_DIVERGED == 4
    assert [line["loss_scale"] for line in lines(tmp_path, "train")] == [2.0**31, 2.0**30, 2.0**30]
    bad = lines(tmp_path, "bad_step")
    assert [line["step"] for line in bad] == [2, 3, 4]  # the first could still be cured
    assert all("gradient not finite (micro-batch 0 of data rank 0)" in line["culprit"] for line in bad)
    shown = capsys.readouterr()
    assert shown.out.count(" skipped: ") == 3 and f" step 4 skipped: {bad[-1]['culprit']}" in shown.out
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("pretrain_vit.py: training diverged: step 4: ") and bad[-1]["culprit"] in shown.err


def test_a_run_in_bf16_that_diverges_ends_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a rate this high makes weights overflow to Inf, and every later loss NaN
    keys = {"optimizer__lr": "1e38", "optimizer__clip_grad": "0", "schedule__name": "constant"}
    assert run(tmp_path, 50, precision__dtype="bf16", train__max_bad_steps="3", **keys) == EXIT_DIVERGED == 4
    bad, train = lines(tmp_path, "bad_step"), lines(tmp_path, "train")
    assert len(bad) == 3 and all(" not finite (micro-batch 0 of data rank 0)" in line["culprit"] for line in bad)
    assert train[-1]["skipped_steps"] == 2 and all(line["loss_scale"] == 1.0 for line in train)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("pretrain_vit.py: training diverged: step ")
    assert f"first: {bad[-1]['culprit']}. 3 steps in a row had to be skipped (train.max_bad_steps)" in error[0]


def test_a_bad_step_in_bf16_is_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of its 8 micro-batches few are on the device at once, also where it is diagnosed."""
    alive: set[int] = set()
    most = 0
    to_device = Assembly.to_device

    def counted(self: Assembly, batch: Batch, *, training: bool) -> MicroBatch:
        nonlocal most
        moved = to_device(self, batch, training=training)
        if training:
            alive.add(id(moved))
            weakref.finalize(moved, alive.discard, id(moved))
            most = max(most, len(alive))
        return moved

    monkeypatch.setattr(Assembly, "to_device", counted)
    config = small(
        train=TrainConfig(steps=4, global_batch_size=8, micro_batch_size=1, max_bad_steps=2),
        precision=PrecisionConfig(dtype="bf16"),
    ).resolve(1)
    config = replace(config, log=replace(config.log, interval=1))
    stepper = Stepper(assemble(config, make_grid(config.grid_shape(1)), torch.device("cpu")))
    place: dict[str, Any] = {"first": 0, "image_shape": (1, 8, 8), "num_classes": 10, "seed": 0}
    images = Poisoned(size=32, **place)
    images.bad = chain.from_iterable([bad, *[False] * 7] for bad in (False, True, False, True))
    writer = MetricsWriter(tmp_path, steps=4, global_batch_size=8, tensorboard=False)
    Loop(stepper, images, SyntheticDataset(size=8, **place), steps=4, writer=writer).run()
    writer.close()
    train, bad = lines(tmp_path, "train"), lines(tmp_path, "bad_step")
    assert [line["skipped_steps"] for line in train] == [0, 1, 1, 2]
    assert [line["loss"] is None for line in train] == [False, True, False, True]
    culprit = "input images not finite (micro-batch 0 of data rank 0)"
    told = {"event": "bad_step", "loss": None, "grad_norm": None, "culprit": culprit}
    assert all(line.pop("wall_time") > 0 for line in bad)
    assert bad == [told | {"step": 2}, told | {"step": 4}]
    shown = capsys.readouterr().out
    assert f" step 2 skipped: {culprit}\n" in shown and f" step 4 skipped: {culprit}\n" in shown
    assert stepper.assembly.optimizer.steps == 2
    assert 0 < most <= 4
