"""What a configuration's objective trains: its layers, how often they are passed, what they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data import TextShape
from engine.config.contrastive import ContrastiveConfig
from engine.config.inheritance import inheritance_of
from engine.config.lifting import with_projection
from engine.config.pipeline import Pipeline
from engine.config.stored import check_stored
from engine.config.teachers import at_steps, check_maps, check_teachers, matching_of, taught_by
from engine.config.tower_teachers import tower_teacher_of, with_step
from engine.errors import ConfigError
from model import (
    LayerSpec,
    ModelConfig,
    TextConfig,
    TowersTeacher,
    build_student,
    build_taught_towers,
    build_towers,
    check_parallel,
    check_towers,
    student_layers,
)
from parallel.grid import GridShape
from parallel.pipeline import Schedule
from parallel.pipeline.actions import ActionKind

if TYPE_CHECKING:
    from engine.config.config import Config

Passes = Literal["auto", 1, 2]
_FIRST_BACKWARDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


def runs_forwards_first(schedule: Schedule) -> bool:
    """Whether the last stage runs the forwards of all micro-batches before the first of its backwards.

    By readiness, too: there no backward runs ahead of a forward (parallel.pipeline.readiness).
    """
    last = schedule.num_stages - 1
    own = [a.kind for a in schedule.ranks[schedule.stage_to_rank[last]] if a.stage == last and a.kind.is_compute]
    first = next((n for n, kind in enumerate(own) if kind in _FIRST_BACKWARDS), len(own))
    return ActionKind.FORWARD not in own[first:]


def passes_of(objective: str, given: Passes, pipeline: Pipeline, micro_batches: int) -> Passes:
    """The key `passes` of an objective with a joint loss, as far as it can be known before memory is: `auto` where that
    decides, of a contrastive one.

    Raises:
        ConfigError: one pass, with a schedule that cannot keep all forwards.
    """
    alone = pipeline.ranks == 1
    if micro_batches == 1:
        return given if given != "auto" else 1
    able = alone or runs_forwards_first(pipeline.schedule(micro_batches))
    if given == 1 and not able:
        name = pipeline.parallel.schedule
        raise ConfigError(
            f"{objective}.passes is 1, which needs the outputs of all {micro_batches} micro-batches before the first "
            f"backward, but parallel.schedule {name} runs backwards in between: use gpipe, one micro-batch per step (a "
            "larger train.micro_batch_size), or passes auto or 2"
        )
    if given == "auto" and alone:
        return "auto" if objective == "contrastive" else 2
    if given == "auto":
        return 1 if able else 2
    return given


class Built(NamedTuple):
    """What of a configuration the model is. groups: of keys, resolved, by name. layers, blocks: how many there are.
    what: the layers in words.
    """

    groups: dict[str, Any]
    layers: int
    blocks: int
    what: str


def resolve_model(config: Config, shape: GridShape) -> Built:
    """The groups of keys that say what is trained, resolved for ranks of this shape.

    Raises:
        ValueError: values that cannot be, alone or together or on so many ranks.
    """
    if config.objective == "contrastive":
        return _towers(config, shape)
    model = with_projection(config, config.model.resolve())
    check_parallel(model, shape.tensor, shape.context)
    if not model.num_classes:
        raise ValueError(
            f"model.num_classes is 0, so the model has no classifier, but objective {config.objective} trains one: set "
            "model.num_classes to the number of classes of the data"
        )
    if model.head_bias is None and model.classifier_bias:
        model = replace(model, head_bias=-10.0 if config.train.loss == "sigmoid" else 0.0)
    depth, merges = model.sizes.depth, len(model.sizes.stages) - 1
    layers, what = depth + merges + 2, f"the model ({_inner('embedding', depth, merges, 'head')})"
    if config.objective == "distillation":
        check_stored(config, model)
        teachers = taught_by(config, model)
        check_teachers(teachers, shape)
        inheritance_of(config, model)  # what it refuses is refused here
        if (matching := matching_of(config, teachers, model)) is not None and shape.context > 1:
            check_maps(model, teachers, matching, shape.context)
        layers, several = len(build_student(model, teachers, matching)), "s" * (len(teachers) > 1)
        what = f"the student and its teacher{several}" if teachers else "the student"
        return Built({"model": model, "distillation": at_steps(config.distillation)}, layers, depth, what)
    return Built({"model": model}, layers, depth, what)


def blocks_of(config: Config) -> int:
    """How many blocks a resolved configuration has, of all towers, those of teachers apart."""
    if config.objective != "contrastive":
        return config.model.sizes.depth
    return _count(towers(config.model, config.text, config.contrastive), "blocks")


def _count(layers: Sequence[LayerSpec], kind: str) -> int:
    return sum(layer.kind == kind for layer in layers)


def _towers(config: Config, shape: GridShape) -> Built:
    keys = config.contrastive.resolve()
    model = replace(config.model, num_classes=0).resolve()
    text = config.text.resolve() if keys.has_texts else config.text
    config = with_step(replace(config, contrastive=keys))
    keys, teacher = config.contrastive, tower_teacher_of(config, model, text)
    layers = towers(model, text, keys, teacher, local_crops=config.data.local_crops)
    check_towers(layers, shape.tensor, shape.context)
    if 0 < keys.queue < shape.data:
        raise ValueError(
            f"contrastive.queue is {keys.queue}, fewer keys than the {shape.data} data-parallel ranks that share them: "
            f"use {shape.data} or more"
        )
    own = student_layers(layers)
    blocks, merges = _count(own, "blocks"), _count(own, "merges")
    inner = (
        _inner("embeddings", blocks, merges, "heads") if keys.has_texts else _inner("embedding", blocks, merges, "head")
    )
    what = f"{'both towers' if keys.has_texts else 'the tower'} ({inner}, pair){' and their teacher' * bool(teacher)}"
    data = config.data if keys.has_texts else replace(config.data, views=2)
    return Built({"model": model, "text": text, "contrastive": keys, "data": data}, len(layers), blocks, what)


def _inner(first: str, blocks: int, merges: int, last: str) -> str:
    of_merges = f"{merges} patch merge{'s' * (merges > 1)}, " if merges else ""
    return f"{first}, {blocks} blocks, {of_merges}{last}"


def towers(
    model: ModelConfig, text: TextConfig, keys: ContrastiveConfig, teacher: TowersTeacher | None = None, *,
    local_crops: int = 0,
) -> list[LayerSpec]:  # fmt: skip
    """The layers of objective contrastive, of resolved groups: of both towers, or of one, and the pair; before them
    those of a teacher. local_crops: of each image, beside two views.

    Raises:
        ValueError: towers that cannot be projected to one embedding.
    """
    assert keys.temperature is not None and keys.learn_temperature is not None
    layers = build_towers(
        model,
        text if keys.has_texts else None,
        embedding=keys.embedding,
        projection=keys.projection,
        projection_bias=keys.projection_bias,
        temperature=keys.temperature,
        learn_temperature=keys.learn_temperature,
        max_logit_scale=keys.max_logit_scale or math.inf,
        bias=keys.bias,
        predictor=keys.predictor,
        local_crops=local_crops,
    )
    return layers if teacher is None else build_taught_towers(layers, model, text, teacher, keys.embeddings_weight)


def text_shape(config: Config) -> TextShape | None:
    """What the text tower of a resolved configuration reads; None: there is none."""
    if config.objective != "contrastive" or not config.contrastive.has_texts:
        return None
    text = config.text
    assert text.context_length is not None and text.vocabulary_size is not None
    return TextShape(length=text.context_length, vocabulary_size=text.vocabulary_size, end_token=text.end_token)
