"""Steps that wait for data: how long, for what, and what is told of it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DataConfig, TrainStream
from data.datasets import Dataset
from data.work import Work, reading_bytes, timed
from engine.run.data_wait import Figures, Hints, Supply

DECODES = Figures(step=0.5, waited=0.3, making=0.7, reading=0.05, cores=15)
FILES = Figures(step=0.5, waited=0.3, making=0.1, reading=0.9, cores=3)
FEW_CORES = Figures(step=0.5, waited=0.3, making=1.5, cores=3)
COPIES = Figures(step=0.5, waited=0.01, transferred=0.2, making=0.1, cores=3)
FED = Figures(step=0.5, waited=0.02, making=3.0, cores=3)
TOLD_BY_OTHERS = Figures(step=0.5, waited=0.4, cores=3)  # a later stage, which makes nothing


@pytest.mark.parametrize(
    ("ranks", "workers", "told"),
    [
        ([FED, TOLD_BY_OTHERS], 2, None),
        ([FED, DECODES, DECODES, FED], 2, r"60 % of a step .*\(ranks 1, 2\); .* decode, 700 ms a step of 2 workers "
         r"\(read 50\): data.workers 4 would keep up"),  # 0.75 s of work in 0.2 s
        ([DECODES], 0, r"\(rank 0\); .* of the training process .*: data.workers 4 would"),
        ([DECODES], 6, r"data.workers 6 should be enough, so it is cores that others use"),
        ([FILES], 2, r"is read, 900 ms .*data.workers 5 would keep up"),  # who waits for files needs no core of his own
        ([FEW_CORES], 1, r"8 workers would keep up, this rank's 3 cores feed 3: set data.workers 3; cheaper augm"),
        ([FEW_CORES], 3, r"8 workers would keep up, more than this rank's 3 cores feed: cheaper augmentation"),
        ([COPIES, FED], 2, r"42 % .* transfer, .* late by 200 ms a step: workers would not help"),
    ],
)  # fmt: skip
def test_what_starves_is_named_with_its_cure(ranks: list[Figures], workers: int, told: str | None) -> None:
    hint = Hints(workers).of(ranks)
    assert hint is None if told is None else hint is not None and re.search(told, hint), hint


def test_a_hint_is_told_again_only_if_it_changes() -> None:
    hints = Hints(1)
    assert hints.of([DECODES]) is not None and hints.of([DECODES._replace(making=0.75)]) is None
    assert hints.of([FED]) is None and hints.of([DECODES]) is None
    assert hints.of([DECODES._replace(making=2.0)]) is not None and hints.of([FILES]) is not None


class Files(Dataset):
    """Each micro-batch takes 20 ms to read and 10 to decode."""

    image_shape, labels, crops_when_read, num_classes = (1, 4, 4), np.zeros(64, dtype=np.int64), False, 1

    def __len__(self) -> int:
        return 64

    def read(self, indices: Any, crop: Any = None) -> torch.Tensor:
        with reading_bytes():
            time.sleep(0.02)
        time.sleep(0.01)
        return torch.zeros(len(indices), *self.image_shape)


@pytest.mark.parametrize("workers", [0, 2])
def test_work_is_measured_where_it_is_done_and_the_first_step_is_left_out(workers: int) -> None:
    place: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 2, "data_rank": 0, "data_size": 1, "seed": 0}
    stream = TrainStream(Files(), config=DataConfig(workers=workers), **place)
    supply, steps = Supply(stream, local_size=1), stream.steps(0)
    assert supply.figures(0.0) == Figures()
    for seconds in (9.0, 0.5, 0.5):
        list(next(steps))
        supply.after_step(seconds)
    found = supply.figures(0.0)
    assert found.step == 0.5 and supply.figures(0.0) == Figures()
    assert found.reading >= 0.04 and found.making >= 0.02 and found.reading > found.making
    assert workers or found.waited >= 0.06
    steps.close()


def test_who_reads_is_told_apart_from_who_decodes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(10))

    def make() -> int:
        with reading_bytes():
            found = len(file.read_bytes())
            time.sleep(0.01)
        return found

    made, work = timed(make)
    assert made == 10 and work.reading >= 0.01 and 0 <= work.making < 0.01
    with reading_bytes():  # nobody listens
        pass
    assert Work(1, 2) + Work(3, 4) - Work(1, 1) == Work(3, 5)
