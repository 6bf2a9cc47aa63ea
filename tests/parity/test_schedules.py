"""Every schedule, static and by readiness, gives the bits of 1F1B on the same layout: gradients, losses, fp8 histories.

With whatever policy of recomputation; 1F1B itself without.

(In fp32 the ladder holds them against one process, too.) Where stages lie on other ranks, the gradient norm is added up
in another order, and what follows from it may differ in the last bit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from engine.config import Config
from tests.distributed import once, run_ranks
from tests.parity.cases import BY_HAND, FRONT, Case, recomputing
from tests.parity.climb import Climb, climb_all
from tests.parity.test_ladder import relative

STEPS, LAST_BIT = 2, 1e-6  # of fp16 the first is skipped
# (schedule, stages per rank): by readiness in every other layout
EVERY = (
    ("interleaved", 2), ("interleaved", 3), ("zb_h1", None), ("zb_h2", None), ("zb_v", None), ("v_half", None),
)  # fmt: skip
LAYOUTS = {
    2: [
        Case("pyramid", pipeline=2, micro_batches=3, batch=12, ema=0.9),
        Case("swin", pipeline=2, micro_batches=4, precision="bf16", gradients="weights"),
        Case("pairs_sigmoid", pipeline=2, micro_batches=4, precision="fp8"),
    ],
    4: [
        Case("kinds", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=3, batch=12, precision="fp8"),
        Case("pyramid", pipeline=2, context=2, micro_batches=4, zero=2, precision="bf16"),
        Case("parallel", depth=4, pipeline=2, data=2, micro_batches=4, zero=3, precision="fp8", freeze=FRONT),
        Case("sequential", depth=4, pipeline=2, data=2, micro_batches=3, batch=12, zero=1, precision="fp16"),
    ],
}


def variants(number: int, case: Case) -> list[Case]:
    """A layout under every schedule, alternately by readiness; 1F1B itself too, and a file's if it is for so many.

    One goes over gloo.
    """
    policies = ("static", "ready") if number % 2 else ("ready", "static")
    found = [replace(case, schedule=name, virtual=v, policy=policies[i % 2]) for i, (name, v) in enumerate(EVERY)]
    by_hand = [replace(case, schedule=BY_HAND, policy=policies[1])] if case.micro_batches == 3 else []
    by_gloo = [replace(case, schedule="zb_v", policy="ready", shared_memory=False)] if case.zero == 1 else []
    return [*found, replace(case, policy="ready"), *by_hand, *by_gloo]


_PLAIN = {case: variants(i, case) for cases in LAYOUTS.values() for i, case in enumerate(cases)}
_RECOMPUTING = recomputing(case for cases in _PLAIN.values() for case in cases)
VARIANTS = {
    base: [*islice(_RECOMPUTING, len(cases)), *(replace(base, recompute=name) for name in ("full", "selective"))]
    for base, cases in _PLAIN.items()
}


def config_of(case: Case) -> Config:
    """With a loss scale that overflows at first, in fp16."""
    config = case.config()
    if case.precision != "fp16":
        return config
    return replace(config, precision=replace(config.precision, initial_loss_scale=2.0**19, hysteresis=1))


@once
def results(ranks: int) -> dict[Case, Climb]:
    cases = [case for base in LAYOUTS[ranks] for case in (base, *VARIANTS[base])]
    found = run_ranks(ranks, climb_all, cases, STEPS, config_of, timeout=400)[0]
    assert isinstance(found, dict)
    return found


def by_name(found: Climb) -> dict[str, list[Tensor]]:
    """fp8 histories and scales of each linear, on those ranks that hold it, in their order."""
    held = defaultdict(list)
    for rank in found.fp8:
        for name, value in rank.items():
            held[name].append(value)
    return held


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("base", "case"), [(base, case) for base, cases in VARIANTS.items() for case in cases], ids=str
)
def test_a_schedule_gives_the_bits_of_1f1b(base: Case, case: Case) -> None:
    ours, theirs = results(base.ranks)[case], results(base.ranks)[base]
    assert theirs.first_grads.keys() == ours.first_grads.keys()
    assert [name for name, grad in theirs.first_grads.items() if not torch.equal(ours.first_grads[name], grad)] == []
    assert ours.skipped == theirs.skipped and (theirs.skipped > 0) == (base.precision == "fp16")
    assert by_name(ours).keys() == by_name(theirs).keys()
    for name, values in by_name(theirs).items():
        assert all(map(torch.equal, by_name(ours)[name], values)), name
    elsewhere = case.schedule not in ("1f1b", "zb_h1", "zb_h2")
    assert ours.losses == (pytest.approx(theirs.losses, rel=LAST_BIT) if elsewhere else theirs.losses)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=LAST_BIT if elsewhere else 0.0, nan_ok=True)
    limit = LAST_BIT if elsewhere else 0.0
    assert {n for n, p in theirs.parameters.items() if not relative(ours.parameters[n], p) <= limit} == set()
    assert ours.evaluation == pytest.approx(theirs.evaluation, rel=LAST_BIT)
    assert ours.average == pytest.approx(theirs.average, rel=LAST_BIT)
