"""What images of several sizes in one micro-batch ask of the other keys (data.variable_resolution)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.resolution import check_pairs
from engine.config.objective_keys import set_keys
from engine.errors import ConfigError
from model.checks import check_packed
from parallel.grid import GridShape

if TYPE_CHECKING:
    from engine.config.config import Config

_OF_ONE_SIZE = ("mixup", "cutmix", "eval_transform", "crop_pct")
"""Ways to change images, or to show them, that are made of images of one size."""


def check_resolution(config: Config, shape: GridShape) -> None:
    """Raise ConfigError where a resolved configuration cannot have them."""
    if not (varies := config.data.variable_resolution):
        return
    refused: dict[str, str | bool] = {
        f"objective {config.objective}": config.objective != "supervised" and "use objective supervised",
        f"parallel.context_parallel_size {shape.context}": shape.context > 1 and "use tensor or data ranks",
        f"log.attention_interval {config.log.attention_interval}": config.log.attention_interval > 0 and "set it to 0",
    }
    refused |= {f"{key} {value}": "leave it out" for key, value in set_keys("data", config.data, _OF_ONE_SIZE).items()}
    for key, cure in refused.items():
        if cure:
            raise ConfigError(
                f"data.variable_resolution is {varies}, and {key} is for images of one size: {cure}, or "
                "data.variable_resolution 0"
            )
    assert config.train.micro_batch_size is not None
    try:
        check_packed(config.model)
        check_pairs(config.train.micro_batch_size)
    except ValueError as error:
        raise ConfigError(f"data.variable_resolution is {varies}: {error}") from error
