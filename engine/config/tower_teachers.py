"""The teacher of a contrastive student: two towers, as their checkpoint says, and whether the student reads what he
does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.teachers import at_step, fingerprint_of
from engine.errors import ConfigError
from engine.precision.precision import DTYPES
from model import ModelConfig, Pixels, TextConfig, TowersTeacher
from model.formats.api import open_weights
from model.formats.base import Description
from model.formats.weights import Which

if TYPE_CHECKING:
    from engine.config.config import Config


@dataclass(frozen=True)
class FoundTowers:
    """What a checkpoint says.

    Attributes:
        path: of the weights, of several steps the folder of the newest. which: of them. description: of both towers.
            fingerprint: of the weights, wherever they lie.
    """

    path: Path
    which: Which
    description: Description
    fingerprint: str


@cache
def towers_at(path: str, which: Which) -> FoundTowers:
    """What lies there. Read once in a run, as engine.config.teachers.found_at.

    Raises:
        ConfigError: nothing does that can be read, or it is of one tower.
    """
    try:
        with open_weights(Path(path), only_model=True, which=which, whole=True) as weights:
            found = FoundTowers(weights.path, which, weights.description, fingerprint_of(weights, which))
    except (OSError, ValueError) as error:
        raise ConfigError(f"contrastive.teacher: {error}") from error
    if found.description.pairing is None:
        raise ConfigError(
            f"contrastive.teacher {path} has no text tower: take a checkpoint of objective contrastive with texts, or "
            "use objective distillation, which takes models of images alone"
        )
    return found


def tower_teacher_of(
    config: Config, model: ModelConfig | None = None, text: TextConfig | None = None
) -> TowersTeacher | None:
    """That of a configuration, if there is one.

    Args:
        model, text: resolved; None: the configuration is.

    Raises:
        ConfigError: his checkpoint cannot be read, or he reads other images or texts than the student.
    """
    keys = config.contrastive
    if config.objective != "contrastive" or keys.teacher is None:
        return None
    model, text = model or config.model, text or config.text
    found = towers_at(keys.teacher, keys.teacher_load_weights)
    pairing, data, own = found.description.pairing, config.data, found.description.preprocessing
    assert pairing is not None
    there = found.description.model
    _check(keys.teacher, there, pairing.text, model, text)
    wanted = (data.mean, data.std) if own is None else (own.mean, own.std)
    return TowersTeacher(
        image=there, text=pairing.text, embedding=pairing.embedding, projection=pairing.projection,
        projection_bias=pairing.projection_bias, max_logit_scale=pairing.max_logit_scale,
        pixels=Pixels.between((data.mean, data.std), wanted, there.sizes.image, there.sizes.channels),
        dtype=DTYPES[keys.teacher_dtype or config.precision.dtype], fp8=keys.teacher_dtype == "fp8",
    )  # fmt: skip


def _check(path: str, there: ModelConfig, texts: TextConfig, model: ModelConfig, text: TextConfig) -> None:
    if there.sizes.channels != model.sizes.channels:
        raise ConfigError(
            f"contrastive.teacher {path} takes images of {there.sizes.channels} channel(s) and the student of "
            f"{model.sizes.channels}: set model.in_channels to {there.sizes.channels}, or take another teacher"
        )
    for name in ("context_length", "vocabulary_size", "end_token"):
        if (theirs := getattr(texts, name)) != (own := getattr(text, name)):
            raise ConfigError(
                f"contrastive.teacher {path} has text.{name} {theirs} and the student {own}, and both read the same "
                f"tokens: set text.{name} to {theirs} (and data.tokenizer to his), or take another teacher"
            )


def with_step(config: Config) -> Config:
    """With the folder of the step that is read, where the teacher is a folder of several."""
    if config.contrastive.teacher is None:
        return config
    return replace(config, contrastive=replace(config.contrastive, teacher=at_step(config.contrastive.teacher)))
