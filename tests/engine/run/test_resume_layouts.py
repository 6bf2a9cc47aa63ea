"""Stopping and going on in the same layout gives the same bits on several ranks: ZeRO stages, stages in turn, fp8."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data import build_datasets
from engine.assemble import assemble, grid_of
from engine.config import Config, LogConfig, OptimizerConfig, PrecisionConfig
from engine.run.loop import Loop
from engine.run.metrics import MetricsWriter
from engine.run.resume import checkpoint_dir, resume
from engine.run.saving import Saving, facts_for_manifests
from engine.run.step import Stepper
from engine.run.stopping import StopRequests
from parallel import comm
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.run.test_resume import STEPS, config_of, fp16, lines, progress, state

ROOT = Path(__file__).parents[3]
T2, P2, C2, MODEL8 = (
    {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"context_parallel_size": 2},
    {"width": 32, "mlp_dim": 64},
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A layout, and what is trained in it. stops: after which steps."""

    parallel: dict[str, Any]
    optimizer: str = "adamw"
    dtype: str = "fp32"
    ema: float | None = 0.9
    stops: tuple[int, ...] = (2, 5)
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path) -> Config:
        """Two images a micro-batch: two of these a step on each data rank where there are two."""
        precision = fp16() if self.dtype == "fp16" else {"precision": PrecisionConfig(dtype=self.dtype)}  # type: ignore[arg-type]
        changes = precision | (MODEL8 if self.dtype == "fp8" else {}) | self.changes
        return config_of(
            folder,
            train={"global_batch_size": 8, "micro_batch_size": 2, "check_interval": 0},
            parallel=ParallelConfig(**self.parallel),
            optimizer=OptimizerConfig(name=self.optimizer, ema_decay=self.ema),  # type: ignore[arg-type]
            log=LogConfig(interval=3, tensorboard=False),
            depth=4,
            **{"num_heads": 4} | changes,
        )


FOUR = {
    "data 4, stage 0": Variant(parallel={}, dtype="fp16"),
    "data 4, stage 3": Variant(parallel={"zero_stage": 3, "bucket_mib": 0.001}, dtype="fp8", stops=(4,)),
    "tensor x data, stage 1": Variant(parallel=T2 | {"zero_stage": 1}, optimizer="lamb", dtype="fp16", stops=(3, 4)),
    "pipeline x data, stage 2": Variant(parallel=P2 | {"zero_stage": 2}, optimizer="adafactor", dtype="bf16"),
    "context x data, stage 3": Variant(parallel=C2 | {"zero_stage": 3}, optimizer="muon", stops=(1, 7)),
    "context x tensor, stage 2": Variant(parallel=C2 | T2 | {"zero_stage": 2}, optimizer="adafactor"),
    "pipeline of 4": Variant(parallel={"pipeline_parallel_size": 4}, optimizer="muon", dtype="fp8", ema=None),
    "stages in turn x tensor": Variant(
        parallel=P2 | T2 | {"schedule": "interleaved", "schedule_policy": "ready"}, optimizer="lamb", dtype="bf16"
    ),
    "stages as a V x data, stage 3": Variant(
        parallel=P2 | {"zero_stage": 3, "schedule": "zb_v"}, dtype="fp16", stops=(3, 8)
    ),
}  # fmt: skip
EIGHT = {
    "2 x 2 x 2, stage 1": Variant(parallel=P2 | T2 | {"zero_stage": 1}, dtype="fp16"),
    "2 x 2 x 2, stage 3": Variant(parallel=P2 | T2 | {"zero_stage": 3}, optimizer="muon", dtype="bf16", stops=(4,)),
    "2 x 2 context, stage 2": Variant(parallel=P2 | T2 | C2 | {"zero_stage": 2}, optimizer="adafactor", stops=(5,)),
}


def attempt(world: World, variant: Variant, folder: Path, until: int | None, async_save: bool) -> None:
    """What `pretrain` does between the start of the process groups and their end."""
    config = variant.config(folder)
    checkpoint = replace(config.checkpoint, async_save=async_save)
    config = replace(config, train=replace(config.train, stop_step=until), checkpoint=checkpoint).resolve(world.size)
    cpu = torch.device("cpu")
    grid = grid_of(config, world, cpu)
    checkpoints = checkpoint_dir(config, folder)
    sets = build_datasets(config.data, image_size=8, channels=1, num_classes=10, seed=0)
    facts = facts_for_manifests(config, grid, cpu, *sets)
    build = partial(assemble, config, grid, cpu)
    a, resumed = resume(build, checkpoints, steps=lambda done: STEPS, facts=facts["about"])
    writer = None
    if world.rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        writer = MetricsWriter(folder, steps=STEPS, global_batch_size=8, tensorboard=False, resumed_at=resumed.step)
    comm.barrier(grid.world)
    loop = Loop(
        Stepper(a), *sets, steps=STEPS, writer=writer, saving=Saving(a, checkpoints, facts, writer),
        progress=resumed.progress, requests=StopRequests(config.train, world.rank, time.monotonic()),
    )  # fmt: skip
    assert (loop.run() is None) == (until is None)
    if writer is not None:
        writer.close()
    grid.close()


def on_ranks(world: World, variants: dict[str, Variant], folder: Path) -> None:
    for name, variant in variants.items():
        for ends, way in (((None,), "straight"), ((*variant.stops, None), "stopped")):
            for until in ends:
                attempt(world, variant, folder / name / way, until, async_save=until is not None and until % 2 == 0)


def check(variants: dict[str, Variant], ranks: int, folder: Path) -> None:
    run_ranks(ranks, on_ranks, variants, folder, timeout=240)
    for name, variant in variants.items():
        straight, stopped = folder / name / "straight", folder / name / "stopped"
        assert lines(straight, "train", "eval") == lines(stopped, "train", "eval"), name
        assert progress(straight, STEPS) == progress(stopped, STEPS), name
        a, b = state(straight, STEPS), state(stopped, STEPS)
        assert a.keys() == b.keys() and len(a) > 50
        assert [of for of in a if not torch.equal(a[of], b[of])] == [], name
        if variant.dtype == "fp16":
            assert 0 < lines(straight, "train")[-1]["skipped_steps"] < STEPS, name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopped_runs_of_four_ranks(tmp_path: Path) -> None:
    check(FOUR, 4, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopped_runs_of_eight_ranks(tmp_path: Path) -> None:
    check(EIGHT, 8, tmp_path)


def test_killed_at_random(tmp_path: Path) -> None:
    """A short one of docs/checkpoints.md, "Soak"."""
    command = [sys.executable, "-m", "tests.soak", "--kills", "3", "--layout", "4", "--zero", "3", "--async_save"]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "bit-identical" in ended.stdout, ended.stdout + ended.stderr
