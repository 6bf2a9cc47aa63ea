"""What a model's configuration refuses: numbers out of range, numbers that do not fit each other, and keys that would
have no effect. Every message names the key, its value, the cause and the cure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from model.patterns import MOST_LAYERS
from model.sizes import Sizes, StageSizes, class_tokens_of

if TYPE_CHECKING:
    from model.config import ModelConfig, StageConfig

_MOST_PATCHES = 2**22  # of an image: its tables are made one by one, in memory
# Least and most. What is larger than any model of today is a slip of the keyboard, and would end in an allocation that
# fails, or run for hours before it begins.
_STAGE_LIMITS = {
    "depth": (1, MOST_LAYERS),
    "width": (1, 2**20),
    "num_heads": (1, 2**20),
    "mlp_dim": (1, 2**24),
    "window_size": (1, math.inf),
    "grid_size": (1, math.inf),
}
_LIMITS = {
    "patch_size": (1, 4096),
    "in_channels": (1, 2**16),
    "num_classes": (0, 2**31 - 1),
    "class_tokens": (0, 2),
    "registers": (0, 2**16),
    "global_tokens": (0, 2**16),
    "linear_conv": (0, 255),
    "layer_scale": (0, 10_000),
    "rope_base": (1e-3, 1e9),
    "norm_eps": (1e-15, 1),
    "head_bias": (-10_000, 10_000),
}
_WINDOWED = {"window", "shifted_window", "global_tokens"}
_RELATIVE = {"window", "shifted_window"}
_WINDOWS, _CURE = "window, shifted_window or global_tokens", "leave it out, or null"


def check_numbers(config: ModelConfig) -> None:
    """Raise ValueError where a number of a configuration with all keys filled in is out of range."""
    rows, cols = config.image
    for side in (rows, cols):
        _check_range("model.image_size", side, (1, 2**20), shown=config.image_size)
    for name, limits in _LIMITS.items():
        value = getattr(config, name)
        if value is not None:
            _check_range(f"model.{name}", value, limits)
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"model.drop_path is {config.drop_path}: it must be at least 0 and below 1")
    if config.linear_conv and config.linear_conv % 2 == 0:
        raise ValueError(f"model.linear_conv is {config.linear_conv}: the side of the convolution must be odd, or 0")
    owners: list[tuple[str, ModelConfig | StageConfig]] = [("model.", config)]
    if config.stages is not None:
        owners = [(f"model.stages[{i}].", stage) for i, stage in enumerate(config.stages)]
    stages = config.stages or ()
    projection = stages[-1] if len(stages) > 1 and not stages[-1].merge else None
    for prefix, owner in owners:
        for name, (least, most) in _STAGE_LIMITS.items():
            least = 0 if name == "depth" and owner is projection else least
            _check_range(prefix + name, getattr(owner, name), (least, most))
    if (depth := sum(owner.depth or 0 for _, owner in owners)) > MOST_LAYERS:
        raise ValueError(f"model.stages have {depth} blocks: they must be at most {MOST_LAYERS}")
    assert config.patch_size is not None
    if (patches := -(-rows // config.patch_size) * -(-cols // config.patch_size)) > _MOST_PATCHES:
        raise ValueError(
            f"model.image_size {config.image_size} in patches of model.patch_size {config.patch_size} gives {patches} "
            f"patches, more than {_MOST_PATCHES}: use smaller images, or larger patches"
        )


def _check_range(key: str, value: float, limits: tuple[float, float], shown: object = None) -> None:
    least, most = limits
    if not least <= value <= most:  # also what is not a number
        bound = f"at most {most}" if value > most else "0 or more" if least == 0 else f"at least {least}"
        raise ValueError(f"{key} is {value if shown is None else shown}: it must be {bound}")


def check_fit(config: ModelConfig, sizes: Sizes) -> None:
    """Raise ValueError where numbers of a resolved configuration contradict each other."""
    for stage in sizes.stages:
        _check_stage(config, stage, f"model.stages[{stage.index}]." if config.stages else "model.")
    if class_tokens_of(config.pool) and not sizes.class_tokens:
        raise ValueError(
            f"model.pool is {config.pool}, but model.class_tokens is 0: set it to 1, or model.pool to gap or map"
        )
    if sizes.class_tokens == 2 and config.pool != "cls":
        raise ValueError(
            f"model.class_tokens is 2, the second with a classifier of its own, but model.pool is {config.pool}: set "
            "model.pool to cls, or model.class_tokens to 1 or 0"
        )
    if class_tokens_of(config.pool) and _kinds(sizes) == {"causal"}:
        raise ValueError(
            f"model.pool is {config.pool}, but all layers of model.attention are causal, in which the class token, the "
            "first of all, sees nothing: set model.pool to gap or map, or take another kind for some layers"
        )
    if "global_tokens" in _kinds(sizes) and not sizes.prefix:
        raise ValueError("model.attention global_tokens needs model.global_tokens (or registers, or pool cls): set it")
    _check_relative(config, sizes)


def _check_relative(config: ModelConfig, sizes: Sizes) -> None:
    if config.relative_position and (others := sorted(_kinds(sizes) - _RELATIVE)):
        raise ValueError(
            f"model.relative_position is true, but layers of model.attention are {', '.join(others)}, whose patches "
            f"have no offset in a window: use {' and '.join(sorted(_RELATIVE, reverse=True))} alone, or set it to false"
        )


def _check_stage(config: ModelConfig, stage: StageSizes, prefix: str) -> None:
    if stage.width % stage.heads:
        near = sorted(sorted(_divisors(stage.width), key=lambda h: abs(h - stage.heads))[:3])
        raise ValueError(
            f"{prefix}num_heads {stage.heads} does not divide {prefix}width {stage.width}: use {near} heads, "
            f"or a width that is a multiple of {stage.heads}"
        )
    if config.position == "sincos_2d" and stage.index == 0 and stage.width % 4:
        raise ValueError(f"{prefix}width {stage.width} must be a multiple of 4 for model.position sincos_2d")
    if config.position == "rope_2d" and stage.depth and stage.head_dim % 4:
        raise ValueError(
            f"{prefix}width {stage.width} over {stage.heads} heads gives {stage.head_dim} features each: "
            "model.position rope_2d needs a multiple of 4"
        )


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def _kinds(sizes: Sizes) -> set[str]:
    return {kind for stage in sizes.stages for kind in stage.kinds}


def check_used(config: ModelConfig, sizes: Sizes, *, given: ModelConfig, usual: Mapping[str, Any]) -> None:
    """Raise ValueError where a key was given and has no effect.

    A resolved configuration, which has every key, resolves to itself: so a key counts as given where it differs from
    what it would have been.

    Args:
        config: resolved. sizes: its numbers. given: before it was. usual: what keys that are left out get.
    """
    for key, value, reason in (*_unused(config, sizes), *_unused_in_stages(config, sizes, given, usual)):
        if value is not None and value != usual.get(key):
            raise ValueError(f"model.{key} is {value}, but {reason}")


def _unused(config: ModelConfig, sizes: Sizes) -> Iterator[tuple[str, Any, str]]:
    """(key, value, why it has no effect and what to do) of keys of the model."""
    kinds, sides = _kinds(sizes), [_sides(stage) for stage in sizes.stages]
    windows, grids = {window for window, _ in sides}, {grid for _, grid in sides}
    if config.window_size not in windows | grids:
        yield "window_size", config.window_size, f"no layer of model.attention is {_WINDOWS} and goes by it: {_CURE}"
    if config.grid_size not in grids | {config.window_size}:
        yield "grid_size", config.grid_size, f"no layer of model.attention is grid and goes by it: {_CURE}"
    if "linear" not in kinds:
        yield "feature_map", config.feature_map, f"no layer of model.attention is linear: {_CURE}"
        yield "linear_conv", config.linear_conv, f"no layer of model.attention is linear: {_CURE}"
    if "global_tokens" not in kinds:
        cure = "add kind global_tokens to model.attention, or use model.registers"
        yield "global_tokens", config.global_tokens, f"no layer attends to them: {cure}"
    if config.position != "rope_2d":
        yield "rope_base", config.rope_base, f"model.position is {config.position}, not rope_2d: {_CURE}"
    if config.norm == "rmsnorm":
        yield "norm_bias", config.norm_bias, f"model.norm is rmsnorm, which has none: {_CURE}"
        yield "qk_norm_bias", config.qk_norm_bias, f"model.norm is rmsnorm, which has none: {_CURE}"
    if not config.qk_norm:
        yield "qk_norm_over", config.qk_norm_over, f"model.qk_norm is {config.qk_norm}: {_CURE}, or set model.qk_norm"
        yield "qk_norm_bias", config.qk_norm_bias, f"model.qk_norm is {config.qk_norm}: {_CURE}, or set model.qk_norm"
    if config.norm_bias != config.bias and config.qkv_bias != ("all" if config.bias else "none"):
        yield "bias", config.bias, f"model.norm_bias and model.qkv_bias both say otherwise: {_CURE}"
    if config.position != "learned_1d":
        why = f"model.position is {config.position}, which has no table of one row per token: {_CURE}"
        yield "class_position", config.class_position, why
    elif not sizes.class_tokens:
        yield "class_position", config.class_position, f"there are no class tokens: {_CURE}"
    if not sizes.classes:
        for key, value in (("classifier_bias", config.classifier_bias), ("head_bias", config.head_bias or None)):
            yield key, value, f"model.num_classes is 0, so there is no classifier: {_CURE}"
    elif not config.classifier_bias:
        yield "head_bias", config.head_bias or None, f"model.classifier_bias is false: {_CURE}"
    if config.mlp == "swiglu" and config.pool != "map":  # whose own MLP has a GELU
        yield "gelu", config.gelu, f"model.mlp swiglu has none: {_CURE}"
    if sizes.depth == 1 and config.drop_path:
        yield "drop_path", config.drop_path, "its rates grow from 0 in the first block, and there is one: set it to 0"


def _sides(stage: StageSizes) -> tuple[int | None, int | None]:
    """Of the windows and of the grids that a stage has."""
    return stage.window if _WINDOWED & set(stage.kinds) else None, stage.grid if "grid" in stage.kinds else None


def _unused_in_stages(
    config: ModelConfig, sizes: Sizes, given: ModelConfig, usual: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """The same where the stages of a pyramid were given."""
    if not given.stages:
        return
    if all(stage.attention is not None for stage in given.stages if stage.depth):
        yield "attention", given.attention, f"every entry of model.stages names its own: {_CURE}"
    if not given.stages[0].merge:
        yield "stages[0].merge", False, "no stage lies before it: leave it out"
    of_preset = dict(enumerate(usual.get("stages") or ()))
    for i, (stage, here) in enumerate(zip(given.stages, sizes.stages, strict=True)):
        window, grid = _sides(here)
        if not stage.depth:
            yield f"stages[{i}].attention", stage.attention, f"it has no blocks: {_CURE}"
        elsewhere = {config.window_size, of_preset.get(i, {}).get("window_size")}
        if here.window not in {window, grid} | elsewhere:
            yield f"stages[{i}].window_size", stage.window_size, f"none of its layers is {_WINDOWS}: {_CURE}"
        if here.grid not in {grid, config.grid_size, here.window} | elsewhere:
            yield f"stages[{i}].grid_size", stage.grid_size, f"none of its layers is grid: {_CURE}"


def check_packed(config: ModelConfig) -> None:
    """Raise ValueError where a resolved model does not take images of several sizes in one micro-batch."""
    if config.stages is not None:
        raise ValueError("model.stages is set: images of several sizes are for models without a pyramid")
    others = sorted({kind for stage in config.sizes.stages for kind in stage.kinds} - {"full"})
    if others:
        raise ValueError(
            f"model.attention has {', '.join(others)}: of images of several sizes it is full, within each image"
        )
