"""What `recompute.norm_backward: output` needs: compiled kernels, and weights of norms by which one can divide.

Such a norm is differentiated from y = xh * weight + bias, its output, by xh = (y - bias) / weight (docs/kernels.md), so
it is no policy of those that keep every bit, and nobody chooses it but the user.
"""

from __future__ import annotations

import re
from math import inf

import torch

from engine.assembly import Assembly
from engine.config import Config
from engine.errors import ConfigError
from engine.layer_list import layer_of
from model.kernels import Kernels
from parallel import comm

LEAST = 1e-3
"""Of a weight. What y was rounded by is divided by it."""

_NORM = re.compile(r"(?:\w+\.)?blocks\.\d+\.norm\d?\.weight")
_KEY = "recompute.norm_backward output"


def check_norm_kernels(config: Config, device: torch.device) -> None:
    """Raise ConfigError where no kernel differentiates norms so."""
    if not config.recompute.norm_from_output:
        return
    if config.kernels in ("reference", "apex"):
        raise ConfigError(
            f"{_KEY} needs this engine's compiled norms, but kernels is {config.kernels}: take kernels native or auto, "
            "or norm_backward input"
        )
    if not Kernels(config.kernels).is_native("layer_norm", device):
        raise ConfigError(
            f"{_KEY} needs compiled kernels, which are not there for {device.type}: build them (docs/kernels.md), or "
            "take norm_backward input"
        )


def check_norm_weights(a: Assembly) -> None:
    """Raise ConfigError where weights, new, loaded or of an earlier attempt, are too close to zero. Collective.

    Nothing goes backward through the norms of a frozen front, or of a teacher: these may be of any weights.
    """
    if not a.config.recompute.norm_from_output:
        return
    backward = {layer.name for layer, passes in zip(a.layers, a.frozen.passes, strict=True) if passes > 1}
    own = {
        name: float(piece.values.abs().min())
        for piece in a.store.model_pieces("w")
        if _NORM.fullmatch(name := piece.name.removeprefix("w/"))
        and layer_of(name) in backward
        and piece.values.numel()
    }
    name = min(own, key=own.__getitem__, default="")
    found = comm.gather_objects((own.get(name, inf), name), a.grid.world)
    least, name = min(found)
    if least < LEAST:
        raise ConfigError(
            f"{_KEY} divides by weights of norms, of which {name} has one of {least:.3g}: they must be at least "
            f"{LEAST:g}; take norm_backward input"
        )
