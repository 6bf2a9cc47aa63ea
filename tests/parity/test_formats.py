"""bf16, fp16 and fp8 in several layouts against one process in the same format.

In exact arithmetic layouts agree, so what differs is rounding, and bounds follow from the formats. A rounding to a
format of machine epsilon e is off by e / sqrt(12) of the number at most (uniform in a spacing, which is e of a number
at the lower end of its binade). K roundings one after the other, forward and backward, add up as a random walk; two
layouts round independently, which doubles the square. So the first gradient of a parameter differs by about

    NOISE = sqrt(2 K) e / sqrt(12)  of its norm,

with K about 20 for each layer: ten operations forward and ten backward (16-bit formats), or, where linears multiply in
8 bits, 5 linears x 2 operands, forward in e4m3 and backward with gradients in e5m2, whose e is twice as large. The cube
in focused linear attention makes three times as much of what is rounded before it; with half of the roundings there,
NOISE doubles. In 16 bits it doubles, too, where attention is left to torch's kernel, which rounds probabilities and
their gradients: errors are twice those of one rounding then (parallel.tensor.products.attends_through_fp32). A loss
moves by that times the part of the logits that differs between classes (0.2 at such an age, of losses of 2.3), and
rounding averages out over 16 images: 0.2 / 2.3 / 4, about a fiftieth of NOISE.

Each image's gradient is rounded by itself. What is rounded adds up as gradients that have nothing to do with each other
would; where those of a batch cancel, it is so much more of the sum (CANCELLED, from the gradients of single images).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import sqrt
from statistics import mean

import pytest
import torch
from torch import Tensor

from parallel.process_group import World
from parallel.tensor.products import attends_through_fp32
from tests.distributed import once, run_ranks
from tests.parity.cases import MODELS, PAIRS, Case
from tests.parity.climb import Climb, climb, climb_all
from tests.parity.test_ladder import reference

LAYOUTS = [
    Case("parallel", tensor=2, sequence_parallel=True, micro_batches=2),
    Case("heads", tensor=2, micro_batches=2),
    Case("pyramid", pipeline=2, micro_batches=4),
    Case("kinds", context=2, micro_batches=2),
    Case("mixed", data=2, micro_batches=2, zero=3),
    Case("swin", tensor=2, sequence_parallel=True, micro_batches=2),
    Case("parallel", tensor=2, sequence_parallel=True, data=2),
    Case("sequential", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4),
    Case("heads", data=2, context=2, micro_batches=2),
]
OUTER = [
    Case("distilled", tensor=2, sequence_parallel=True, micro_batches=2, precision="fp8"),
    Case("beside", context=2, micro_batches=2, zero=2, precision="bf16"),
    Case("pairs", data=2, micro_batches=2, zero=2, precision="fp16"),
]
FORMATS = ("bf16", "fp16", "fp8")
ALL = [*(replace(case, precision=dtype) for dtype in FORMATS for case in LAYOUTS), *OUTER]
E4M3, E5M2 = torch.finfo(torch.float8_e4m3fn).eps, torch.finfo(torch.float8_e5m2).eps


def noise(case: Case) -> float:
    """NOISE, as above."""
    blocks, focused = case.blocks, case.model in MODELS and MODELS[case.model].feature_map == "focused"
    # of pairs both sides of a product are rounded, and it is multiplied by 14
    factor = 2 if focused or case.model in PAIRS else 1
    if case.precision == "fp8":
        return factor * sqrt(2 * 5 * blocks * (2 * E4M3**2 + E4M3**2 + E5M2**2) / 12)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    if not attends_through_fp32(half, torch.device("cpu")):
        factor *= 2
    return factor * sqrt(2 * 20 * (blocks + 2) / 12) * torch.finfo(half).eps


@cache
def cancelled(case: Case) -> float:
    """CANCELLED, as above, at least 1, of one process in fp32: from the first images of the first batch."""
    if case.model in PAIRS:  # whose losses are not sums over images
        return 1.0
    single = replace(case, batch=1).config()
    norms = climb(World(), replace(single, optimizer=replace(single.optimizer, lr=0.0))).grad_norms
    return max(1.0, sqrt(mean(norm**2 for norm in norms) / case.batch) / reference(case).grad_norms[0])


@once
def results(ranks: int) -> dict[Case, Climb]:
    found = run_ranks(ranks, climb_all, [case for case in ALL if case.ranks == ranks], timeout=560)[0]
    assert isinstance(found, dict)
    return found


def assert_near(ours: Climb, theirs: Climb, bound: float, cancelled: float = 1.0) -> None:
    """Within NOISE, `bound`; gradients within that times CANCELLED."""
    assert ours.skipped == theirs.skipped == 0
    assert ours.losses == pytest.approx(theirs.losses, rel=bound / 32)
    assert ours.evaluation[0] == pytest.approx(theirs.evaluation[0], rel=bound / 32)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=bound * cancelled)
    assert ours.first_grads.keys() == theirs.first_grads.keys()
    # what is zero in exact arithmetic (the key bias under a softmax) is rounding of what is not
    floor = theirs.grad_norms[0] / sqrt(len(theirs.first_grads)) / 64
    far = {
        name: d
        for name, g in theirs.first_grads.items()
        if not (d := distance(ours.first_grads[name], g, floor)) <= 1.5 * bound * cancelled
    }
    assert not far, f"first gradients differ by more than {1.5 * bound * cancelled} of their norm: {far}"


def distance(ours: Tensor, theirs: Tensor, floor: float) -> float:
    return ((ours - theirs).norm() / (theirs.norm() + floor)).item()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_layout_is_near_one_process(case: Case) -> None:
    more = cancelled(replace(case.one_process, precision="fp32"))
    assert_near(results(case.ranks)[case], reference(case.one_process), noise(case), more)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in ALL if case.precision == "fp8"], ids=str)
def test_ranks_that_share_tensors_have_the_same_amax_histories(case: Case) -> None:
    ours, theirs = results(case.ranks)[case].fp8, reference(case.one_process).fp8[0]
    assert len(ours) == case.ranks
    names = set().union(*ours)
    assert names == set(theirs) and names
    for name in names:
        holders = [rank for rank, found in enumerate(ours) if name in found]
        assert len(holders) == case.ranks // case.pipeline
        for rank in holders[1:]:
            assert torch.equal(ours[rank][name], ours[holders[0]][name]), (name, rank)
    for name in (name for name in names if name.endswith("amax_history")):
        here = next(found[name] for found in ours if name in found)
        assert int((here.amax(1) > 0).sum()) == len(here[here.amax(1) > 0]) == 10
        # the largest of all values on all ranks: the first step's inputs and weights are those of one process
        first = theirs[name][9, :2]
        assert torch.allclose(here[9, :2], first, rtol=noise(case)), (name, here[9], theirs[name][9])


def test_the_bounds_notice_a_gradient_that_half_the_ranks_forgot() -> None:
    torch.set_num_threads(1)
    theirs = climb(World(), Case("parallel", precision="bf16").config())
    wrong = dict(theirs.first_grads)
    wrong["blocks.2.core.q_norm.weight"] = wrong["blocks.2.core.q_norm.weight"] / 2
    with pytest.raises(AssertionError, match=r"blocks\.2\.core\.q_norm"):
        assert_near(replace(theirs, first_grads=wrong), theirs, noise(Case("parallel", precision="bf16")))
