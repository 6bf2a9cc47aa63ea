"""No run ends well, and no weights are kept, with weights or outputs that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain_vit
from engine.assemble import assemble, grid_of
from engine.config import OptimizerConfig, PrecisionConfig, TrainConfig
from engine.errors import EXIT_DIVERGED, EXIT_DONE, DivergedError
from engine.run.finite import check_finite
from engine.run.launch import run_rank
from engine.run.step import Stepper
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.run.test_loop import assert_same, batches, loop, state
from tests.engine.small import flags, small

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def stepper(world: World, dtype: Any = "fp32", **keys: Any) -> Stepper:
    config = small(
        parallel=ParallelConfig(bucket_mib=0.001, **keys),
        train=TrainConfig(steps=3, global_batch_size=8),
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(ema_decay=0.9, clip_grad=0.0),
    ).resolve(world.size)
    return Stepper(assemble(config, grid_of(config, world, CPU), CPU))


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("bf16", {"zero_stage": 1}),
    ("bf16", {"zero_stage": 3, "reshard_after_forward": "always"}),
    ("fp32", {"tensor_parallel_size": 2}),
    ("fp16", {"pipeline_parallel_size": 2}),
]


def plant(world: World, layouts: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """What is said of one bad element of the last rank's master, average, second moment, rounded weight."""
    told = []
    for dtype, layout in layouts:
        a = stepper(world, dtype, **layout).assembly
        check_finite(a, 7)
        assert a.average is not None
        average = list(a.average.pieces())[-1]
        fragment = next(f for f in a.optimizer.fragments.fragments if f"average/{f.name}" == average.name)
        moment = next(p for p in a.optimizer.pieces() if p.name == f"optimizer.exp_avg_sq/{fragment.name}")
        said = []
        for piece, value in (
            (fragment.weight, NAN), (average.values, -INF), (moment.values, INF), (fragment.model_weight, INF),
        ):  # fmt: skip
            if piece is None:
                continue
            good = piece[-1].clone()
            if world.rank == world.size - 1:
                piece[-1] = value
            with pytest.raises(DivergedError) as caught:
                check_finite(a, 7)
            said.append(str(caught.value).partition(" is not finite")[0])
            piece[-1] = good
        check_finite(a, 7)
        told.append(said)
    return told


def test_one_bad_element_anywhere_is_found_on_every_rank() -> None:
    alone = plant(World(), [("fp32", {}), ("bf16", {})])
    kinds = ["weights", "average", "optimizer.exp_avg_sq", "rounded weights"]
    for told in (alone, *run_ranks(2, plant, LAYOUTS)):
        for said, rounded in zip(
            told, [False, True] if told is alone else [False, True, True, False, True], strict=True
        ):
            assert [what.partition("/head.")[0] for what in said] == [f"step 7: {k}" for k in kinds[: 3 + rounded]]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_whose_model_gives_nan_is_no_success(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer bad steps than would end the run, or none."""
    argv = flags(run_dir=str(tmp_path), train__steps=str(steps), optimizer__lr="1e30", schedule__name="constant")
    assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DIVERGED == 4
    error = capsys.readouterr().err.splitlines()
    assert (
        len(error) == 1 and f"step {steps}: the weights are finite, but the loss of the evaluation is nan" in error[0]
    )


def test_weights_that_overflow_in_the_last_step_are_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(run_dir=str(tmp_path), optimizer__lr="1e38", optimizer__weight_decay="1e10")
    assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DIVERGED
    assert "is not finite, and nothing good can come of it" in capsys.readouterr().err


def test_a_run_of_nothing_but_bad_steps_is_no_success() -> None:
    with pytest.raises(DivergedError, match=r"step 3: .*3 steps in a row"):
        loop([True] * 3, max_bad_steps=5).run()
    loop([False, True, True], max_bad_steps=5).run()  # the model is as the first step left it


def test_where_almost_nothing_has_a_gradient_nothing_becomes_nan(tmp_path: Path) -> None:
    """The least eps that there may be, on images that are black for the most part, with gradients down to 1e-20."""
    keys = {"optimizer__eps": "1e-20", "model__layer_scale": "1e-20", "train__steps": "3"}
    for name in ("adamw", "lamb", "muon"):
        argv = flags(run_dir=str(tmp_path / name), optimizer__name=name, **keys)
        assert run_rank(pretrain_vit.main, argv, "pretrain_vit.py") == EXIT_DONE, name


def test_a_gradient_that_cannot_be_squared_is_skipped() -> None:
    """Its second moment would be infinite for good, and the element would never move again."""
    s = stepper(World())
    before = state(s)
    hook = s.assembly.parameters()["head.fc.bias"].register_hook(lambda grad: grad * 2.0**80)
    assert s.train_step(batches(), 1e-3).skipped
    assert_same(state(s), before)
    hook.remove()
    assert not s.train_step(batches(), 1e-3).skipped
    assert all(t.isfinite().all() for tensors in s.assembly.optimizer.state_tensors().values() for t in tensors)
