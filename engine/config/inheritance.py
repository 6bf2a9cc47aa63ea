"""What of a teacher's a student's first weights are (`distillation.start_from`), by configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from engine.config.teachers import Found, found_of
from engine.errors import ConfigError
from model import ModelConfig
from model.inherit import Inherited, chosen_blocks, inherit

if TYPE_CHECKING:
    from engine.config.config import Config


@dataclass(frozen=True)
class Inheritance:
    """Where a student's first weights come from.

    Attributes:
        found: the teacher. model: his, for the student's images and patches. student: resolved. blocks: his, one for
            each of the student's. tensors: of the student, each out of one of `model`.
    """

    found: Found
    model: ModelConfig
    student: ModelConfig
    blocks: tuple[int, ...]
    tensors: Mapping[str, Inherited]

    def describe(self) -> str:
        """What is taken, in words."""
        there, here = self.model.sizes, self.student.sizes
        parts = [f"blocks {', '.join(map(str, self.blocks))} of {there.depth}"]
        for stage, (theirs, own) in enumerate(zip(there.stages, here.stages, strict=True)):
            sizes = {
                "heads": (theirs.heads, own.heads), "features of a head": (theirs.head_dim, own.head_dim),
                "features": (theirs.width, own.width), "hidden features": (theirs.mlp, own.mlp),
            }  # fmt: skip
            less = [f"{count} of {of} {what}" for what, (of, count) in sizes.items() if count != of]
            if less:
                parts.append(("" if len(here.stages) == 1 else f"in stage {stage} ") + ", ".join(less))
        return "; ".join(parts)


def inheritance_of(config: Config, student: ModelConfig | None = None) -> Inheritance | None:
    """Of a configuration whose objective is distillation, if its student is to start from its first teacher.

    Args:
        student: the model, resolved; None: the configuration is.

    Raises:
        ConfigError: the student has what the teacher has not, or is to start from other weights.
    """
    keys, student = config.distillation, student or config.model
    if config.objective != "distillation" or keys.start_from is None:
        return None
    if config.checkpoint.load is not None:
        raise ConfigError(
            f"distillation.start_from is {_shown(keys.start_from)} and checkpoint.load {config.checkpoint.load}: a "
            "student starts from one of the two; leave the other out"
        )
    found = found_of(keys.all_teachers[0])
    blocks = cast('tuple[int, ...] | Literal["first", "even"]', keys.start_from)
    try:
        model = found.of_classes(student.sizes.classes)
        model = replace(model, image_size=student.image_size, patch_size=student.patch_size).resolve()
        parts = inherit(model, student, blocks)  # which compares the models, before blocks are chosen
        return Inheritance(found, model, student, tuple(chosen_blocks(model, student, blocks)), parts)
    except ValueError as error:
        raise ConfigError(
            f"distillation.start_from {_shown(keys.start_from)}, from {found.path}: {error}; or leave start_from out"
        ) from error


def _shown(value: tuple[int, ...] | str) -> str:
    return value if isinstance(value, str) else str(list(value))
