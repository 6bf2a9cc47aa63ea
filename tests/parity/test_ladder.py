"""The numerics ladder: every layout trains to the same numbers as one process, and one process to those of a plain ViT.

Tolerances are those the project promises (docs/numerics.md): loss 1e-5, gradient norm 1e-4, each parameter's first
gradient and last value 1e-4 of its norm, all in fp32 after 10 steps with drop-path, augmentation, clipping and decay.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.optimizers.schedules import factor
from engine.run.step import Stepper
from parallel.layout import info_of
from parallel.pipeline import SCHEDULES
from parallel.process_group import World
from tests.distributed import once, run_ranks
from tests.parity import plain_vit
from tests.parity.cases import MODELS, STEPS, Case, all_isotropic, cases, settings
from tests.parity.climb import EVAL_IMAGES, Climb, climb, climb_all, first_batches
from tests.parity.covering import pairs
from tests.parity.plain_shapes import plain_shape

LOSS, NORM, TENSOR = 1e-5, 1e-4, 1e-4
TIMEOUT = {1: 60, 2: 240, 4: 480, 8: 560}  # seconds for all cases of a world size, beside another file of tests


@cache
def reference(case: Case) -> Climb:
    """One process, one micro-batch."""
    torch.set_num_threads(1)
    return climb(World(), case.config())


@once
def results(ranks: int) -> dict[Case, Climb]:
    """All cases of a world size, on one set of processes."""
    found = run_ranks(ranks, climb_all, cases(ranks), timeout=TIMEOUT[ranks])[0]
    assert isinstance(found, dict)
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Distance in units of their norm; NaN (a part that no rank holds) counts as far."""
    if torch.equal(ours, theirs):  # frozen biases of zeros
        return 0.0
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    return distance if distance == distance else float("inf")


def assert_same(ours: Climb, theirs: Climb) -> None:
    """All that the ladder compares."""
    assert ours.losses == pytest.approx(theirs.losses, rel=LOSS)
    assert ours.targets == pytest.approx(theirs.targets, rel=LOSS)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=NORM)
    for what in ("first_grads", "parameters"):
        a, b = getattr(ours, what), getattr(theirs, what)
        assert a.keys() == b.keys()
        far = {name: d for name in b if not (d := relative(a[name], b[name])) <= TENSOR}
        assert not far, f"{what} differ by more than {TENSOR} of their norm: {far}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [c for ranks in (1, 2, 4, 8) for c in cases(ranks)], ids=str)
def test_layout_equals_one_process(case: Case) -> None:
    ours, theirs = results(case.ranks)[case], reference(case.one_process)
    assert_same(ours, theirs)
    loss, accuracy, images = theirs.evaluation
    assert ours.evaluation[0] == pytest.approx(loss, rel=LOSS)
    assert ours.evaluation[1:] == (accuracy, images)
    assert images == EVAL_IMAGES


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_schedule_is_held_against_one_process(ranks: int) -> None:
    assert {c.schedule for c in cases(ranks) if c.pipeline > 1 and c.micro_batches > 1} >= SCHEDULES.keys()


@pytest.mark.parametrize(("ranks", "grids"), [(1, 1), (2, 3), (4, 6), (8, 10)])
def test_every_pair_of_settings_is_on_the_ladder(ranks: int, grids: int) -> None:
    """Of grid, model, sequence parallelism, one or several micro-batches, and schedule."""
    climbed = {replace(case, recompute="none") for case in cases(ranks)}
    combinations = [settings(case) for case in all_isotropic(ranks)]
    chosen = [settings(case) for case in all_isotropic(ranks) if case in climbed]
    assert pairs(*chosen) == pairs(*combinations)
    assert len({one["grid"] for one in chosen}) == grids and {one["several"] for one in chosen} == {False, True}


@pytest.mark.parametrize("model", MODELS)
def test_one_process_equals_a_plain_vit(model: str) -> None:
    config = Case(model).config()
    config = replace(config, model=replace(config.model, drop_path=0.0))
    weights: dict[str, Tensor] = {}
    decays: dict[str, float] = {}

    def keep(stepper: Stepper) -> None:
        by_group = {"body": 0.1, "head": 0.3, "none": 0.0}
        for slot in stepper.assembly.store.slots:
            weights[slot.name] = slot.parameter.detach().clone()
            decays[slot.name] = by_group[info_of(slot.parameter).decay]

    ours = climb(World(), config, before_training=keep)
    shape = plain_shape(config.model)
    rates = [config.optimizer.lr * factor(config.schedule, step, STEPS) for step in range(STEPS)]
    losses, norms, first = plain_vit.train(
        weights,
        shape,
        first_batches(config),
        rates,
        loss=config.train.loss,
        decays=decays,
        eps=config.optimizer.eps,
        clip=config.optimizer.clip_grad,
    )
    final = {name: value.detach() for name, value in weights.items()}
    assert_same(ours, Climb(losses=losses, grad_norms=norms, first_grads=first, parameters=final))


def test_a_wrong_gradient_is_noticed() -> None:
    """The ladder can fail: one parameter's gradient off by a thousandth is seen."""
    theirs = reference(Case("parallel"))
    wrong = dict(theirs.first_grads)
    wrong["blocks.2.in_proj.weight"] = wrong["blocks.2.in_proj.weight"] * 1.001
    with pytest.raises(AssertionError, match=r"blocks\.2\.in_proj"):
        assert_same(replace(theirs, first_grads=wrong), theirs)
