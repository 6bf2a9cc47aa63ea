"""Fewer ranks than a run began with, or more: what of them trains, on which micro-batches, and how the others end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data import DataConfig
from engine.config import TrainConfig
from engine.run.elastic import fit
from parallel.config import ParallelConfig
from parallel.process_group import World
from tests.engine.run.test_failures import start
from tests.engine.small import flags, small

CASES = [
    # batch, micro-batch, tensor x pipeline; ranks -> ranks that train, micro-batch
    (64, None, 1, 1, 4, 4, None),
    (64, None, 1, 1, 3, 2, None),
    (64, 16, 1, 1, 3, 2, 16),
    (48, 12, 1, 1, 3, 3, 8),
    (64, 5, 2, 1, 7, 4, 4),
    (24, None, 1, 2, 10, 8, None),  # 4 x 2: each rank's 6 images are one micro-batch per stage; 5 do not divide 24
    (8, None, 1, 2, 16, 8, None),  # not 8 data ranks, of one image each, which is less than a stage's
]


@pytest.mark.parametrize(("batch", "micro", "tensor", "pipeline", "ranks", "used", "micro_used"), CASES)
def test_what_fits(
    batch: int,
    micro: int | None,
    tensor: int,
    pipeline: int,
    ranks: int,
    used: int,
    micro_used: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    parallel = ParallelConfig(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, elastic=True)
    config = small(train=TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro), parallel=parallel)
    last = World(rank=ranks - 1, size=ranks, local_rank=1, local_size=2)
    fitted, world, notes = fit(config, last)
    assert (world.size, world.size + world.idle, fitted.train.micro_batch_size) == (used, ranks, micro_used)
    assert len(notes) == (used < ranks) + (micro_used != micro) and fitted.train.global_batch_size == batch
    fitted.resolve(world.size)
    first_of_last_host = ranks - 2
    assert world.local_size == max(0, min(2, used - first_of_last_host))


def test_images_that_share_their_room_stay_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes, they cannot be parted: of 24 images 8 ranks would have 3 each, so 6 ranks have 4."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    data = DataConfig(kind="synthetic", size=32, variable_resolution=0.5)
    for micro, expected in ((6, 4), (2, 2), (None, 4)):
        train = TrainConfig(steps=1, global_batch_size=24, micro_batch_size=micro)
        config = small(data=data, train=train, parallel=ParallelConfig(elastic=True))
        fitted, world, _ = fit(config, World(size=8, local_size=8))
        assert (world.size, fitted.resolve(world.size).train.micro_batch_size) == (6, expected)


@pytest.mark.slow
def test_ranks_that_are_left_over_wait_and_end_alike(tmp_path: Path) -> None:
    def run(**changes: str) -> tuple[int, str, str]:
        argv = flags(run_dir=str(tmp_path), parallel__elastic="true", train__micro_batch_size="4", **changes)
        process = start(["-m", "tools.launch", "--nproc-per-node", "3", "pretrain_vit.py", *argv])
        out, error = process.communicate(timeout=120)
        return process.returncode, out, error

    code, out, error = run(train__steps="3")
    assert (code, error) == (0, ""), (out, error)
    assert len(re.findall("elastic: 2 of 3 ranks train, the others wait: ", out)) == 1
    code, out, error = run(optimizer__lr="1e38", train__steps="40", checkpoint__resume="never")
    assert code == 4 and error.startswith("pretrain_vit.py: training diverged: ") and len(error.splitlines()) == 1
