"""The device that a configuration computes on: chosen, and found able to do all that the configuration asks of it."""

from __future__ import annotations

import torch

from engine.config import Config
from engine.config.teachers import formats_of_teachers
from engine.device import choose_device
from engine.norm_backward import check_norm_kernels
from engine.precision.precision import check_format, check_kernels, check_precision
from model.kernels import Kernels
from parallel.process_group import World


def device_of(config: Config, world: World) -> torch.device:
    """This rank's, before ranks talk.

    Args:
        config: resolved.

    Raises:
        ConfigError: there is none such, or it has not the number formats or kernels that are asked for.
    """
    device = choose_device(config.device, world)
    check_precision(config.precision, device)
    for path, dtype in formats_of_teachers(config):
        check_format(f"the dtype of the teacher {path}", dtype, device)
    check_kernels(Kernels(config.kernels), device)
    check_norm_kernels(config, device)
    return device
