"""From the `precision` group to formats by layer, and whether this device can compute in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from engine.errors import ConfigError
from engine.precision.config import PrecisionConfig
from model import MATCH, LayerSpec, Precision
from model.kernels import Kernels
from parallel.fp8 import choose_backend, fp8_obstacle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_SINCE = {"bf16": (8, 0), "fp16": (5, 3)}  # compute capability with fast products


def precision_of(config: PrecisionConfig, layers: Sequence[LayerSpec]) -> Precision:
    """What each layer computes in: of two towers, the first and last blocks of each are kept high, and where they meet
    is fp32 always.
    """
    apart = {layer.tower.name: layer.tower.dtype for layer in layers if layer.tower and layer.tower.dtype}
    fp8_rows = frozenset(of.name for of in layers if of.tower is not None and of.tower.fp8 and of.kind == "blocks")
    layers = [layer for layer in layers if layer.tower is None or layer.tower.name not in apart]
    towers = dict.fromkeys(layer.tower for layer in layers)
    by_tower = [[layer.name for layer in layers if layer.kind == "blocks" and layer.tower == t] for t in towers]
    blocks, edge = [name for own in by_tower for name in own], set[str]()
    for own in by_tower:
        edge |= {*own[: config.high_first_blocks], *own[max(0, len(own) - config.high_last_blocks) :]}
    outer = {layer.name for layer in layers if layer.kind in config.high_layers}
    pair = {layer.name for layer in layers if layer.joins}  # 16 bits of a temperature are steps of half a percent
    fp8 = config.dtype == "fp8"
    high = outer | pair if fp8 else outer | pair | edge
    for before, layer in pairwise(layers):
        high |= {layer.name} if layer.kind == MATCH and before.name in high else set()  # which gives out its rows
    return Precision(
        dtype=DTYPES[config.dtype],
        high=frozenset(high),
        norms_in_fp32="norms" in config.high_layers,
        fp8=frozenset(set(blocks) - edge if fp8 else ()),
        apart=tuple(apart.items()),
        fp8_rows=fp8_rows,
    )


def check_kernels(kernels: Kernels, device: torch.device) -> None:
    """Raise ConfigError where kernels are asked for that this device cannot run."""
    try:
        kernels.check(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_precision(config: PrecisionConfig, device: torch.device) -> None:
    """Raise ConfigError where the device cannot compute in this format."""
    check_format("precision.dtype", config.dtype, device)
    if config.dtype == "fp8":
        try:
            choose_backend(config.fp8_backend, device)
        except ValueError as error:
            raise ConfigError(f"precision.{error}") from error


def check_format(key: str, wanted: str, device: torch.device) -> None:
    """The same of a format that a key asks for; of fp8 by our own products."""
    if wanted == "fp8":
        if problem := fp8_obstacle(device):
            raise ConfigError(f"{key} is fp8: {problem}")
        return
    if device.type != "cuda" or wanted == "fp32":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _SINCE[wanted]:
        able = [name for name, since in _SINCE.items() if capability >= since]
        raise ConfigError(
            f"{key} is {wanted}, which {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}) does not have: use {' or '.join([*able, 'fp32'])}"
        )
