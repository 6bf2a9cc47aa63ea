"""Optimizers over flat shards of the parameters. State is sharded as the fragments are that they are given."""

from engine.optimizers.adafactor import Adafactor
from engine.optimizers.adamw import AdamW
from engine.optimizers.base import Constants, GroupOptions, Optimizer
from engine.optimizers.config import OptimizerConfig
from engine.optimizers.lamb import Lamb
from engine.optimizers.muon import Muon
from model.kernels import Kernels
from parallel.sharding.fragments import Fragments

__all__ = ["Adafactor", "AdamW", "Constants", "GroupOptions", "Lamb", "Muon", "Optimizer", "make_optimizer"]

_CLASSES: dict[str, type[Optimizer]] = {"adamw": AdamW, "adafactor": Adafactor, "lamb": Lamb, "muon": Muon}


def make_optimizer(config: OptimizerConfig, fragments: Fragments, kernels: Kernels, depth: int) -> Optimizer:
    """The optimizer of a resolved configuration.

    Args:
        depth: of the head. A group at depth d learns at layer_decay^(depth - d) of the rate (Bao et al. 2022, BEiT).
    """
    assert config.head_weight_decay is not None
    decays = {"body": config.weight_decay, "head": config.head_weight_decay, "none": 0.0}
    groups = {span.group for span in fragments.spans} | {fragment.group for fragment in fragments.fragments}
    options = {
        group: GroupOptions(lr_scale=config.layer_decay ** (depth - group.depth), weight_decay=decays[group.decay])
        for group in groups
    }
    constants = Constants(betas=config.betas, eps=config.eps, momentum=config.momentum or 0.0)
    return _CLASSES[config.name](fragments, options, constants, kernels)
