"""Every ZeRO stage gives the bits of stage 0 on the same layout: losses, norms, gradients, weights, moving averages.

So does every policy of recomputation, at any stage, against none at stage 0, in every format.

Stages 2 and 3 sum over ranks after each micro-batch. Stage 0 can do that too, and then all stages add up in one order.
Each layer is a unit of its own, and stage 3 has two buffers for all of them, so buffers are overwritten all the time.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import once, run_ranks
from tests.parity.cases import MODELS, Case, recomputing
from tests.parity.climb import Climb, climb_all

STEPS = 2  # a bit that differs after the first update is in all of the second step, after that in what is evaluated
_OTHERS = ("adafactor", "lamb", "muon")
_HOW: dict[str, dict[str, Any]] = {
    "kinds": {"optimizer": "adafactor", "ema": 0.9},
    "sequential": {"optimizer": "lamb", "ema": 0.9},
    "heads": {"optimizer": "muon", "ema": 0.9},
    "mixed": {"precision": "bf16", "ema": 0.9},
    "pyramid": {"precision": "fp8", "optimizer": "muon"},
}
"""Of the models, what is not fp32 by AdamW."""
LAYOUTS = {
    2: [
        *(Case(model, data=2, micro_batches=2, **_HOW.get(model, {})) for model in MODELS),
        Case("kinds", context=2),
        Case("parallel", tensor=2, sequence_parallel=True, micro_batches=2),
        Case("kinds", data=2, micro_batches=2, precision="bf16", gradients="weights", ema=0.9),
        Case("sequential", data=2, micro_batches=2, precision="fp16", gradients="weights", optimizer="lamb"),
        Case("pairs", data=2, micro_batches=2, precision="fp8"),
        Case("moco", data=2, micro_batches=2, precision="bf16", ema=0.9),
        Case("pyramid", data=2, micro_batches=2, precision="fp8", freeze=("embed", "blocks.[0-2]", "blocks.4")),
        Case("parallel", data=2, micro_batches=2, precision="bf16", ema=0.9, freeze=("embed", "*.bias", "*norm*")),
    ],
    4: [
        Case("parallel", data=4),
        Case("parallel", tensor=2, sequence_parallel=True, data=2, micro_batches=2),
        Case("heads", tensor=2, data=2, micro_batches=2),
        Case("heads", tensor=2, data=2, micro_batches=2, gather=0.057),  # tensor ranks by themselves: 2 buffers, and 3
        Case("sequential", pipeline=2, data=2, micro_batches=4, cut=(4, 1)),
        Case("pyramid", pipeline=2, data=2, micro_batches=4, schedule="gpipe"),
        Case("heads", data=2, context=2, micro_batches=2),
        *(
            Case(
                "sequential", tensor=2, sequence_parallel=True, data=2, micro_batches=2, optimizer=name, precision=dtype
            )
            for name, dtype in zip(_OTHERS, ("fp32", "fp32", "bf16"), strict=True)
        ),
        Case("parallel", tensor=2, sequence_parallel=True, data=2, micro_batches=2, precision="bf16", ema=0.9),
        Case("mixed", pipeline=2, data=2, micro_batches=4, precision="bf16", gradients="weights", ema=0.9),
    ],
    8: [Case("parallel", tensor=2, sequence_parallel=True, pipeline=2, data=2, micro_batches=4)],
}
STAGES = (1, 2, 3)
ALL = [(case, stage) for cases in LAYOUTS.values() for case in cases for stage in STAGES]
SHARDED = dict(zip(ALL, recomputing(replace(case, zero=stage) for case, stage in ALL), strict=True))
"""Of each layout and stage, what is held against stage 0 without recomputation."""
for key in ((LAYOUTS[2][0], 2), (LAYOUTS[4][4], 3)):  # a pipeline's stages are cut by hand: norms add up in one order
    SHARDED[key] = replace(SHARDED[key], recompute="auto")


def whole(case: Case, stage: int) -> Case:
    """Stage 0, with sums over ranks in the order of `stage`."""
    return case if stage < 2 else replace(case, reduce="micro_batch")


@once
def results(ranks: int) -> dict[Case, Climb]:
    cases = [made for case in LAYOUTS[ranks] for made in (case, whole(case, 2), *(SHARDED[case, z] for z in STAGES))]
    found = run_ranks(ranks, climb_all, cases, STEPS, timeout=560)[0]
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "stage"), [pytest.param(*key, id=str(made)) for key, made in SHARDED.items()])
def test_every_stage_and_policy_is_stage_0_without_bit_for_bit(case: Case, stage: int) -> None:
    found = results(case.ranks)
    plain, sharded = found[whole(case, stage)], found[SHARDED[case, stage]]
    assert sharded.losses == plain.losses
    assert sharded.grad_norms == plain.grad_norms
    assert sharded.evaluation == plain.evaluation
    assert sharded.average == plain.average
    assert (plain.average != (0.0, 0.0, 0)) == (case.ema is not None)
    assert plain.skipped == 0
    for ours, theirs in ((sharded.first_grads, plain.first_grads), (sharded.parameters, plain.parameters)):
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
