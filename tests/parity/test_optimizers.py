"""The ladder for Adafactor, LAMB and Muon: layouts train to the numbers of one process, at the ladder's tolerances."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed import once, run_ranks
from tests.parity.cases import STEPS, Case
from tests.parity.climb import Climb, climb_all
from tests.parity.test_ladder import LOSS, assert_same, reference

LAYOUTS = [
    Case("parallel", tensor=2, sequence_parallel=True, micro_batches=2),
    Case("heads", tensor=2, micro_batches=2),  # 3 heads and 2: uneven parts of matrices
    Case("pyramid", pipeline=2, micro_batches=4),
    Case("kinds", context=2, micro_batches=2),
    Case("parallel", tensor=2, sequence_parallel=True, data=2, zero=3),
    Case("sequential", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4),
]
ALL = [replace(case, optimizer=name) for name in ("adafactor", "lamb", "muon") for case in LAYOUTS]
_NOISE = 1e-4
_FLIP = STEPS * 1e-3 * 2.0**-8  # every step at the peak rate


@once
def results(ranks: int) -> dict[Case, Climb]:
    found = run_ranks(ranks, climb_all, [case for case in ALL if case.ranks == ranks], timeout=560)[0]
    assert isinstance(found, dict)
    return found


def without_noise(ours: Climb, theirs: Climb) -> tuple[Climb, Climb]:
    """Both with 0 for what two layouts may do differently under Adafactor, for two reasons.

    It has no eps but 1e-30: the first update of an element is its gradient's sign, however small the gradient. Where
    that is zero in exact arithmetic (the key bias under a softmax), or so near to zero that the order of a sum decides
    its sign, two layouts move the element by a whole step in opposite directions: no bound holds for it, as for AdamW
    with a tiny eps (docs/numerics.md). First gradients differ by up to 5e-6 of a parameter's norm between layouts;
    elements below 1e-4 of the largest one are left out.

    Its momentum, about 1 in size, is kept in bf16. Where the last bit of fp32 decides to which of two neighbours it is
    rounded, the element's updates differ by 2^-8 of a step, and less with each step after. Of values 1e-6 apart that
    is one in some thousand per step: two elements of a parameter, or one in 500, may differ by that.
    """
    known = {name: grad.abs() > _NOISE * grad.abs().max() for name, grad in theirs.first_grads.items()}
    for name, value in theirs.parameters.items():
        distance = (ours.parameters[name] - value).abs().mul_(known[name]).flatten()
        largest = distance.topk(min(len(distance), max(2, len(distance) // 500)))
        known[name].view(-1)[largest.indices[largest.values < _FLIP]] = False

    def of(climb: Climb) -> Climb:
        return replace(climb, parameters={name: value * known[name] for name, value in climb.parameters.items()})

    return of(ours), of(theirs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_layout_equals_one_process(case: Case) -> None:
    ours, theirs = results(case.ranks)[case], reference(case.one_process)
    assert theirs.losses != reference(replace(case.one_process, optimizer="adamw")).losses
    if case.optimizer == "adafactor":
        left_out = sum(int((g.abs() <= _NOISE * g.abs().max()).sum()) for g in theirs.first_grads.values())
        assert left_out < 0.05 * sum(g.numel() for g in theirs.first_grads.values())
        ours, theirs = without_noise(ours, theirs)
    assert_same(ours, theirs)
    assert ours.evaluation[0] == pytest.approx(theirs.evaluation[0], rel=LOSS)
