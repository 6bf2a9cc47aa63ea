"""Costs of layers, each measured by itself, against what whole stages hold: they add up to it, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import pytest

from engine.assemble import assemble
from engine.layer_costs import micro_batch
from engine.plan import META, plan_memory
from engine.recompute.config import RecomputeConfig
from parallel.grid import planned_grid
from tests.engine.recompute.meta_pass import bytes_of_a_pass
from tests.parity.cases import FRONT, MODELS, Case

SCHEDULES = ("1f1b", "interleaved", "zb_v", "zb_h1")
SETS = ("all", "qk_norm", "input", "qk_norm-output", "qkv", "attention", "fc1")


def _cases() -> Iterator[tuple[Case, str]]:
    """Every model; schedules, formats and save sets in turn; other layouts; frozen parts."""
    turns = zip(cycle(SCHEDULES), cycle(SETS), cycle(("fp32", "bf16", "bf16")), strict=False)
    for model, (schedule, sets, precision) in zip([*MODELS, *MODELS], turns, strict=False):
        yield Case(model, pipeline=2, micro_batches=4, schedule=schedule, precision=precision), sets
    several = {"tensor": 2, "sequence_parallel": True, "micro_batches": 2}
    yield Case("parallel", **several), "qk_norm+gather"
    yield Case("kinds", precision="bf16", **several | {"pipeline": 2, "schedule": "zb_v"}), "input"
    yield Case("heads", context=2, **several), "qkv"
    yield Case("parallel", data=2, zero=3, micro_batches=2, precision="bf16"), "input"
    yield Case("sequential", data=2, zero=2, micro_batches=2), "qk_norm"
    yield Case("sequential", pipeline=2, micro_batches=2, freeze=FRONT), "attention"
    yield Case("sequential", pipeline=2, micro_batches=4, freeze=("blocks.[12]",), schedule="zb_v"), "norm"
    yield Case("matched", pipeline=4, micro_batches=4, schedule="zb_h1"), "qk_norm"  # a teacher's rows ride in and out
    yield Case("matched_to_two", precision="bf16", **several), "input"


CASES = dict.fromkeys(_cases())


@pytest.mark.parametrize(("case", "sets"), CASES, ids=lambda value: str(value))
def test_costs_of_layers_add_up_to_a_pass_of_the_rank(case: Case, sets: str) -> None:
    """But for the losses of the micro-batches and the gradient of one, 4 bytes each, which no layer holds."""
    config = replace(case.config(), kernels="native", recompute=RecomputeConfig(policy=sets))
    shape = config.grid_shape(case.ranks)
    for rank in range(case.ranks):
        assembly = assemble(config, planned_grid(shape, rank), META, device_memory=0.0)
        counted, left = bytes_of_a_pass(assembly)
        planned = plan_memory(config, shape, rank, 0.0).activations
        batch = assembly.to_device(micro_batch(assembly), training=True)
        planned -= sum(x.nbytes for x in (batch.images, batch.texts) if x is not None)
        losses = 4 * case.micro_batches * assembly.holds_loss
        assert 0 <= counted - planned <= losses + 8, (counted, planned)
        assert left == losses
