"""Learning-rate schedules as plain functions of the number of updates so far.

Sources: rsqrt with warm-up and linear cool-down, Zhai et al. 2022 (Scaling Vision Transformers); cosine, Loshchilov
and Hutter 2017 (SGDR); warm-up-stable-decay, Hu et al. 2024 (MiniCPM).
"""

from __future__ import annotations

import math

from engine.errors import ConfigError
from engine.optimizers.config import ScheduleConfig


def check_schedule(config: ScheduleConfig, steps: int) -> None:
    """Raise ConfigError where warm-up and cool-down do not fit into the run."""
    if config.warmup_steps + config.cooldown_steps > steps:
        raise ConfigError(
            f"schedule.warmup_steps {config.warmup_steps} and cooldown_steps {config.cooldown_steps} do not fit into "
            f"{steps} steps: shorten them (for a short trial --schedule.warmup_steps 0 --schedule.cooldown_steps 0), "
            "or train longer"
        )


def factor(config: ScheduleConfig, updates: int, steps: int) -> float:
    """Factor on the peak learning rate of the next update, after `updates` of a run of `steps`.

    Every update moves, the first and the last, too: warm-up runs over 1/w, 2/w, ..., 1, and what falls to 0 would be
    there one update after the end. Only updates count: a step that is skipped takes nothing of the schedule.
    """
    w, c = config.warmup_steps, config.cooldown_steps
    warm = min(1.0, (updates + 1) / w) if w else 1.0
    cool = min(1.0, (steps - updates) / (c + 1)) if c else 1.0
    if config.name == "constant" or config.name == "wsd":
        return warm * cool
    if config.name == "rsqrt":
        return warm * cool / math.sqrt(1 + max(0, updates + 1 - w) / config.timescale)
    done = max(0, updates - w) / max(1, steps - w)
    return warm * 0.5 * (1 + math.cos(math.pi * done))
