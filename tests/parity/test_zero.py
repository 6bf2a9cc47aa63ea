"""Every ZeRO stage gives the bits of stage 0 on the same layout."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.distributed import run_ranks
from tests.parity.cases import Case
from tests.parity.climb import Climb, climb_all

LAYOUTS = {
    2: [Case("parallel", data=2, micro_batches=2), Case("kinds", context=2), Case("sequential", data=2)],
    4: [
        Case("parallel", data=4),
        Case("parallel", tensor=2, sequence_parallel=True, data=2),
        Case("sequential", pipeline=2, data=2, micro_batches=4),
        Case("heads", data=2, context=2, micro_batches=2),
    ],
}


@cache
def results(ranks: int) -> dict[Case, Climb]:
    cases = [replace(case, zero=stage) for case in LAYOUTS[ranks] for stage in (0, 1)]
    found = run_ranks(ranks, climb_all, cases, timeout=240)[0]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("case", [case for cases in LAYOUTS.values() for case in cases], ids=str)
def test_stage_1_is_stage_0_bit_for_bit(case: Case) -> None:
    found = results(case.ranks)
    plain, sharded = found[case], found[replace(case, zero=1)]
    assert sharded.losses == plain.losses
    assert sharded.grad_norms == plain.grad_norms
    assert sharded.evaluation == plain.evaluation
    for ours, theirs in ((sharded.first_grads, plain.first_grads), (sharded.parameters, plain.parameters)):
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
