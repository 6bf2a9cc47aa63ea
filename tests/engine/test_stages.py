"""A rank that holds several stages, the first and the last among them: report, plan, diagnosis. (Training and
evaluation: the ladder.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from data import Batch
from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.config import RecomputeConfig, TrainConfig
from engine.plan import LiveBytes, plan_memory, states
from engine.run.recomputed import recompute_lines, recomputed_lines
from engine.run.report import startup_report
from engine.run.step import Stepper
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.test_plan import MEMORY, config_of, made_by_a_step

CPU = torch.device("cpu")
V_SHAPED = (0, 1, 1, 0)
CONFIG = config_of({}, world=2, pipeline_parallel_size=2, schedule="zb_v")
SIX = TrainConfig(steps=1, global_batch_size=12, micro_batch_size=2)  # micro-batches
SPLIT = config_of({}, world=2, train=SIX, pipeline_parallel_size=2, schedule="zb_h1")


class Asked(Sequence[Batch]):
    """Micro-batches; each was asked for how often?"""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.counts = batches, Counter[int]()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, m: Any) -> Any:
        self.counts[m] += 1
        return self.batches[m]


def lines_about_stages(assembly: Assembly) -> list[str]:
    report = startup_report(assembly, threads=1, matmul="mkl", images=[])
    return [line for line in report if line.startswith(("stage ", "pipeline: "))]


def steps(world: World) -> dict[str, Any]:
    """What this rank reports, what a step holds on it, and whom it blames for a bad pixel and a bad weight."""
    assembly = assemble(CONFIG, grid_of(CONFIG, world, CPU), CPU, device_memory=MEMORY)
    out: dict[str, Any] = {"report": lines_about_stages(assembly), "states": states(assembly)}
    stepper = Stepper(assembly)
    batches = batches_of(stepper, 0)
    assert assembly.holds_images == assembly.holds_loss == (world.rank == 0) == (batches[0].images is not None)
    asked = Asked(batches)
    with LiveBytes() as counter:
        stepper.train_step(asked, 1e-3)
    out["asked"] = asked.counts
    images = batches[0].images
    out["activations"] = counter.peak + (0 if images is None else images.nbytes)
    if images is not None:
        batches[1] = replace(batches[1], images=torch.full_like(images, float("nan")))
    out["pixel"] = stepper.train_step(batches, 1e-3).culprit
    weight = assembly.parameters().get("blocks.1.mlp.fc1.weight")
    if weight is not None:
        weight.data[0, 0] = float("nan")
    out["weight"] = stepper.train_step(batches_of(stepper, 2), 1e-3).culprit
    full = replace(CONFIG, recompute=RecomputeConfig(policy="input, qk_norm, all"))
    stepper = Stepper(assemble(full, assembly.grid, CPU, device_memory=MEMORY))
    stepper.train_step(batches_of(stepper, 0), 1e-3)
    assert stepper.assembly.recompute is not None
    out["again"] = dict(stepper.assembly.recompute.ran_again)
    out["told"] = [list(recompute_lines(stepper.assembly)), recomputed_lines(stepper.assembly)]
    out["split"] = made_by_a_step(SPLIT, world)[1]
    return out


def test_ranks_with_several_stages() -> None:
    for rank, made in enumerate(run_ranks(2, steps)):
        assert [line.partition(":")[0] for line in made["report"]] == [
            "pipeline",
            *(f"stage {stage} on pipeline rank {holder}" for stage, holder in enumerate(V_SHAPED)),
        ]
        told = made["report"].pop(0)
        assert told.startswith("pipeline: zb_v, static, 2 stage(s) per rank; bubble ") and "shared memory" in told
        assert "embed" in made["report"][0] and "head" in made["report"][3]
        assert made["pixel"] == "input images not finite (micro-batch 1 of data rank 0)"
        assert made["weight"] == "blocks.1: activation not finite (micro-batch 0 of data rank 0)"
        plan = plan_memory(CONFIG, CONFIG.grid_shape(2), rank, MEMORY)
        assert plan.stages == ((0, 3), (1, 2))[rank]
        for held in (made["states"], plan.states):
            held.pop("reduction buffers")
        assert made["states"] == plan.states
        assert made["activations"] == pytest.approx(plan.activations, rel=0.01)
        split = plan_memory(SPLIT, SPLIT.grid_shape(2), rank, MEMORY)
        assert made["split"] == pytest.approx(split.activations, rel=0.01)  # kept: what is multiplied later, too
        assert made["again"]["norm"] == 2 * 2  # norms of a block x micro-batches
        assert made["again"].keys() >= {"norm", "activation"} | ({"attention", "projection"} if rank == 0 else set())
        planned, counted = made["told"]
        assert [line.partition("block")[0] for line in planned] == [f"recompute: stage {i}: 1 " for i in range(3)]
        assert ["rank 0: " in counted[0], "rank 1: 3 region(s)" in counted[1], len(counted)] == [True, True, 2], counted
        assert made["asked"] == dict.fromkeys(range(2), 1)  # not once more for the rank's second stage
