"""What images of several sizes ask of the other keys is refused by name, before ranks talk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from data import DataConfig
from engine.config import Config, LogConfig, TrainConfig
from engine.errors import ConfigError
from parallel.config import ParallelConfig
from tests.engine.small import GROUPS, small

VARIES = DataConfig(kind="synthetic", size=32, variable_resolution=0.5)


@pytest.mark.parametrize(
    ("changes", "ranks", "named"),
    [
        ({"parallel": ParallelConfig(context_parallel_size=2)}, 2, "context_parallel_size 2 .*use tensor or data"),
        ({"log": LogConfig(attention_interval=5)}, 1, "log.attention_interval 5 .*set it to 0"),
        ({"attention": "window", "window_size": 1}, 1, "model.attention has window.*full"),
        ({"attention": "linear"}, 1, "model.attention has linear"),
        ({"train": TrainConfig(steps=1, global_batch_size=6)}, 2, "train.micro_batch_size is 3, .*use an even number"),
        ({"data": replace(VARIES, mixup=0.8)}, 1, r"data.mixup 0.8 .*leave it out"),
        ({"objective": "distillation"}, 1, "objective|teacher"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], ranks: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        small(**{"data": VARIES} | changes).resolve(ranks)


def test_what_can_be_is_not() -> None:
    config: Config = small(data=VARIES).resolve(1)
    assert config.data.variable_resolution == 0.5
    assert replace(config, data=GROUPS["data"]).resolve(1).data.variable_resolution == 0
