"""A student that keeps the projection to its teacher's width (`distillation.lift`).

Features of a wider teacher are of more dimensions than a narrow student has, and a projection that is there for the
match alone takes with it, when it is dropped, what the student has learnt in the teacher's width (Rethinking Feature
Distillation in Vision Transformers, 2025, which keeps it). So it is made a part of the student: its tokens are
projected behind the last block, and norm, pool and classifier have the teacher's width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engine.config.distillation import DistillationConfig
from engine.config.pairs import pairs_of
from engine.config.teachers import Teachers, taught_by
from engine.errors import ConfigError
from model import ModelConfig
from model.config import StageConfig

if TYPE_CHECKING:
    from engine.config.config import Config

_CURE = "or leave lift out"


def with_projection(config: Config, student: ModelConfig) -> ModelConfig:
    """The student of a configuration, with a last stage of no blocks where its projection is to be kept.

    Args:
        student: resolved. One that has such a stage already, as in a run's config.yaml, is given back as it is.

    Raises:
        ConfigError: there is nothing to be projected, nothing that would be compared behind it, or no one width.
    """
    keys = config.distillation
    if config.objective != "distillation" or keys.lift == "drop":
        return student
    if keys.start_from is not None:
        raise ConfigError(
            f"distillation.lift is keep and start_from {keys.start_from}: a student that starts from its teacher's "
            f"weights has no layer that he has not; leave start_from out, {_CURE}"
        )
    teachers = taught_by(config, student)
    _check_compared(keys, teachers, student)
    width, heads = _one_width(teachers, student)
    if student.sizes.projection is not None:
        return student
    s, stages = student, student.stages
    if stages is None:
        assert s.width is not None and s.depth is not None and s.num_heads is not None
        stages = (StageConfig(depth=s.depth, width=s.width, num_heads=s.num_heads, mlp_dim=s.mlp_dim),)
    behind = StageConfig(depth=0, width=width, num_heads=heads, merge=False)
    return replace(s, width=None, depth=None, num_heads=None, mlp_dim=None, stages=(*stages, behind)).resolve()


def _check_compared(keys: DistillationConfig, teachers: Teachers, student: ModelConfig) -> None:
    """Raise ConfigError where nothing is compared behind the projection."""
    depth = student.sizes.depth
    if not (keys.compares_rows or keys.embeddings_weight):
        raise ConfigError(
            "distillation.lift is keep, but features_weight, embeddings_weight and relations_weight of gram are 0, so "
            f"nothing is compared behind a projection: give one of them a weight, {_CURE}"
        )
    ends = [pairs_of(keys, depth, of.model.sizes.depth)[-1][0] for of in teachers if keys.compares_rows]
    if ends and not keys.embeddings_weight and depth - 1 not in ends:
        raise ConfigError(
            f"distillation.lift is keep, but distillation.pairs has no pair with the student's last block, {depth - 1},"
            f" so nothing is compared behind the projection: add one, give embeddings_weight a weight, {_CURE}"
        )


def _one_width(teachers: Teachers, student: ModelConfig) -> tuple[int, int]:
    """Width and heads of what is behind the projection. Raises ConfigError where there is no such width."""
    wide = {of.model.sizes.last.width: of.model.sizes.last.heads for of in teachers}
    if len(wide) > 1:
        raise ConfigError(
            f"distillation.lift is keep, but the teachers' last blocks are {' and '.join(map(str, wide))} wide, and "
            f"the student is projected once: take teachers of one width, {_CURE}"
        )
    (width, heads), own, projects = *wide.items(), student.sizes.last.width, student.sizes.projection is not None
    if projects and own != width:
        raise ConfigError(
            f"distillation.lift is keep and model.stages end with a projection to {own} features, but the teacher has "
            f"{width}: give that stage his width, {_CURE}"
        )
    if not projects and own == width:
        raise ConfigError(
            f"distillation.lift is keep, but the student's last block is {width} wide, as the teacher's, so nothing is "
            "projected: leave lift out"
        )
    return width, heads
