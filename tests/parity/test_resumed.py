"""Half of the steps in one layout, saved, the rest in another: the numbers of one process that never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver
from engine.checkpoint.states import differences, restore, shapes_of
from engine.run.step import Stepper
from parallel import comm
from parallel.checkpoint.read import Reader
from parallel.process_group import World
from tests.distributed import once, run_ranks
from tests.parity.cases import STEPS, Case
from tests.parity.climb import Climb, climb
from tests.parity.test_formats import assert_near, noise
from tests.parity.test_ladder import LOSS, assert_same, reference

HALF = STEPS // 2
RANKS = 4
ONE_MUON = Case("sequential", optimizer="muon", ema=0.9)
Pair = tuple[Case, Case]
PAIRS: list[Pair] = [
    (
        Case("parallel", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4),
        Case("parallel", data=4, zero=3),
    ),
    (Case("sequential", data=4, zero=1), Case("sequential", tensor=4, sequence_parallel=True)),
    (
        Case("kinds", data=2, context=2, micro_batches=2, zero=2, optimizer="lamb"),
        Case("kinds", tensor=2, pipeline=2, micro_batches=2, optimizer="lamb"),
    ),
    (
        Case("heads", tensor=2, context=2, micro_batches=2, ema=0.9),
        Case("heads", data=2, context=2, micro_batches=2, zero=3, ema=0.9),
    ),
    (
        Case("parallel", pipeline=2, data=2, micro_batches=4, schedule="zb_v", zero=3, cut=(1, 2, 1, 1)),
        Case("parallel", pipeline=4, micro_batches=4),
    ),
    (
        Case("distilled", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4, schedule="zb_h2"),
        Case("distilled", data=2, context=2, micro_batches=2, zero=3),
    ),
    (ONE_MUON, replace(ONE_MUON, tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4)),
    (replace(ONE_MUON, pipeline=2, data=2, micro_batches=4, zero=2), ONE_MUON),
    (
        Case("sequential", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4, precision="fp16"),
        Case("sequential", data=4, zero=3, precision="fp16"),
    ),
    (
        Case("moco_queue", tensor=2, pipeline=2, micro_batches=4),
        Case("moco_queue", data=2, context=2, micro_batches=2, zero=3),
    ),
    (
        Case("parallel", tensor=2, sequence_parallel=True, data=2, precision="fp8"),
        Case("parallel", pipeline=2, data=2, micro_batches=4, zero=1, precision="fp8", schedule="v_half"),
    ),
]


def first_half(world: World, case: Case, folder: Path) -> Climb:
    def save(stepper: Stepper) -> None:
        Saver(stepper.assembly, folder, CheckpointConfig(), {"config": {}, "about": {}}).save(HALF, {}, {})

    return climb(world, case.config(), steps=HALF, after_training=save)


def second_half(world: World, case: Case, folder: Path) -> Climb:
    def load(stepper: Stepper) -> None:
        a = stepper.assembly
        with Reader(folder / f"step-{HALF:08d}") as reader:
            everywhere = comm.gather_objects(shapes_of(a), a.grid.world)
            assert not differences({name: s for found in everywhere for name, s in found.items()}, reader)
            restore(a, reader)
        a.store.loaded()

    return climb(world, case.config(), load, STEPS - HALF, HALF)


def on_ranks(world: World, folder: Path) -> list[list[Climb]]:
    """Halves that are of several ranks, of every pair."""
    found: list[list[Climb]] = []
    for number, (before, after) in enumerate(PAIRS):
        place, halves = folder / str(number), []
        if before.ranks == RANKS:
            halves.append(first_half(world, before, place))
        if after.ranks == RANKS:
            halves.append(second_half(world, after, place))
        found.append(halves)
    return found if world.rank == 0 else []


@once
def results() -> dict[Pair, tuple[Climb, Climb]]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        alone: dict[int, Climb] = {
            i: first_half(World(), before, folder / str(i)) for i, (before, _) in enumerate(PAIRS) if before.ranks == 1
        }
        found = run_ranks(RANKS, on_ranks, folder, timeout=300)[0]
        for i, (before, after) in enumerate(PAIRS):
            if before.ranks == 1:
                found[i].insert(0, alone[i])
            if after.ranks == 1:
                found[i].append(second_half(World(), after, folder / str(i)))
    return {pair: (halves[0], halves[1]) for pair, halves in zip(PAIRS, found, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]} to {pair[1]}")
def test_another_layout_goes_on_as_one_process_that_never_stopped(pair: Pair) -> None:
    (first, second), theirs = results()[pair], reference(pair[0].one_process)
    ours = replace(
        second,
        losses=first.losses + second.losses,
        grad_norms=first.grad_norms + second.grad_norms,
        first_grads=first.first_grads,
    )
    if pair[0].precision != "fp32":
        assert_near(ours, theirs, noise(pair[0]))
        return
    assert_same(ours, theirs)
    for mine, its in ((ours.evaluation, theirs.evaluation), (ours.average, theirs.average)):
        assert mine[0] == pytest.approx(its[0], rel=LOSS) and mine[1:] == its[1:]
