"""What a run trains towards: one object, made from the configuration, that owns all that differs between goals."""

from engine.config import Config
from engine.objectives.base import AdditiveObjective, Evaluation, JointLoss, JointObjective, Objective
from engine.objectives.contrastive import Contrastive
from engine.objectives.distillation import Distillation
from engine.objectives.distillation_of_batch import DistillationOfBatch
from engine.objectives.supervised import Supervised

__all__ = [
    "OBJECTIVES", "AdditiveObjective", "Contrastive", "Distillation", "DistillationOfBatch", "Evaluation", "JointLoss",
    "JointObjective", "Objective", "Supervised", "make_objective",
]  # fmt: skip

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised, "contrastive": Contrastive, "distillation": Distillation,
}  # fmt: skip
"""By the value of the key `objective`."""


def make_objective(config: Config) -> Objective:
    """That of a resolved configuration; needs no process group."""
    if config.relates_images:
        return DistillationOfBatch.of(config)
    return OBJECTIVES[config.objective].of(config)
