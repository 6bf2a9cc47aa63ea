"""The configuration of a run: its keys as frozen dataclasses, YAML files and flags. Groups live where they are used."""

from engine.config.config import Config, plain
from engine.config.train import MAX_COUNT, LogConfig, TrainConfig
from engine.optimizers.config import OptimizerConfig, ScheduleConfig
from engine.precision.config import PrecisionConfig
from engine.recompute.config import RecomputeConfig

__all__ = [
    "MAX_COUNT", "Config", "LogConfig", "OptimizerConfig", "PrecisionConfig", "RecomputeConfig", "ScheduleConfig",
    "TrainConfig", "plain",
]  # fmt: skip
