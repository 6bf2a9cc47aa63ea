"""timm's SwinTransformer (Liu et al. 2021): constructor arguments, our pyramid, and rules between their tensors."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig, StageConfig
from model.formats.base import ConversionError
from model.formats.expressible import ANY, check_expressible
from model.formats.rules import Rule, rule
from model.formats.timm.arguments import SWIN, Constructor
from model.formats.timm.common import (
    bias_rule,
    image_of,
    mlp_of,
    norm_rules,
    patch_of,
    qkv_rules,
    ratio_of,
    refuse_unless,
)
from model.formats.ways import Permuted, Same

_PLAIN: dict[str, set[Any]] = {
    "global_pool": {"avg"}, "always_partition": {False}, "embed_layer": {"PatchEmbed"}, "norm_layer": {"layernorm"},
    "norm_eps": {1e-5},  # a norm_layer that JSON can name, it cannot be made with
}  # fmt: skip


def model_of(made: Constructor) -> ModelConfig:
    """Our model. Raises ConversionError, by name, for an argument that ours has not."""
    refuse_unless(made, _PLAIN)
    a, depths = made.arguments, tuple(made["depths"])
    count = len(depths)
    windows, ratios = _windows(made, count), _each(made, "mlp_ratio", count)
    widths = [a["embed_dim"] * 2**i for i in range(count)]
    heads = _each(made, "num_heads", count)
    if any(dim not in (None, w // h) for dim, w, h in zip(_each(made, "head_dim", count), widths, heads, strict=True)):
        raise ConversionError(f"timm's {SWIN} has head_dim {a['head_dim']}: this model's is the width over the heads")
    model = ModelConfig(
        image_size=image_of(made),
        patch_size=patch_of(made),
        in_channels=a["in_chans"],
        stages=tuple(
            StageConfig(
                depth=depth, width=w, num_heads=h, mlp_dim=mlp_of(w, r), attention=_kinds(depth), window_size=window
            )
            for depth, w, h, r, window in zip(depths, widths, heads, ratios, windows, strict=True)
        ),
        norm_eps=a["norm_eps"],
        qkv_bias="all" if a["qkv_bias"] else "none",
        pre_norm=True,
        position="none",
        relative_position=True,
        pool="gap",
        num_classes=a["num_classes"],
    ).resolve()
    _check_windows(model, f"timm's {SWIN}", "this model's windows at the edge are smaller")
    return model


def _windows(made: Constructor, count: int) -> list[int]:
    """Side of the windows of each stage. Two numbers are rows and columns of all windows there."""
    value = made["window_size"]
    pairs = [value] * count if isinstance(value, int) or (len(value) == 2 and isinstance(value[0], int)) else value
    sides = [{pair} if isinstance(pair, int) else set(pair) for pair in pairs]
    if len(sides) != count or any(len(side) != 1 for side in sides):
        raise ConversionError(
            f"timm's {SWIN} has window_size {value!r}: this model's windows are square, of each stage"
        )
    return [side.pop() for side in sides]


def _each(made: Constructor, key: str, count: int) -> list[Any]:
    """Of an argument, that of each stage."""
    value = made[key]
    found = list(value) if isinstance(value, tuple) else [value] * count
    if len(found) != count or any(isinstance(x, list | tuple) for x in found):
        raise ConversionError(f"timm's {SWIN} has {key} {value!r}: this model has one number for each of its stages")
    return found


def _kinds(depth: int) -> tuple[str, ...]:
    return tuple("shifted_window" if i % 2 else "window" for i in range(depth))


def _check_windows(model: ModelConfig, who: str, why: str) -> None:
    """Theirs fills windows that the map does not fill with zeros that are attended to."""
    for s in model.sizes.stages:
        high, wide = s.window_sides
        if s.rows % high or s.cols % wide:
            raise ConversionError(f"{who} has windows of {s.window} on a map of {s.rows} x {s.cols} patches: {why}")


def made_of(model: ModelConfig) -> Constructor:
    """What timm is to call for a pyramid of ours. Raises ConversionError, by name, for what it has not."""
    who, first = f"timm's {SWIN}", model.sizes.stages[0]
    plain = {
        "stages": ANY, "norm_eps": {1e-5}, "bias": ANY, "norm_bias": ANY, "qkv_bias": {"all", "none", "qv"},
        "patch_bias": ANY, "pre_norm": {True}, "position": {"none"}, "relative_position": {True}, "pool": {"gap"},
        "attention": ANY, "window_size": ANY, "grid_size": ANY, "classifier_bias": ANY, "class_tokens": {0},
    }  # fmt: skip
    check_expressible(who, model, plain)
    for i, s in enumerate(model.sizes.stages):
        if i and not s.merges:
            raise ConversionError(f"model.stages[{i}].merge is false: {who} merges patches from stage to stage")
        if s.width != first.width * 2**i:
            raise ConversionError(f"model.stages[{i}].width is {s.width}: {who} doubles it from stage to stage")
        if s.kinds != _kinds(s.depth):
            raise ConversionError(
                f"model.stages[{i}].attention is {', '.join(s.kinds)}: {who} alternates window and shifted_window"
            )
    if any(side % model.sizes.patch for side in model.image):
        raise ConversionError(f"model.image_size {model.image_size} is not whole patches: {who} drops the rest")
    _check_windows(model, "model.stages", f"{who} fills them up with zeros that are attended to")
    stages = model.sizes.stages
    values: dict[str, Any] = {
        "img_size": model.image, "patch_size": model.patch_size, "in_chans": model.in_channels,
        "num_classes": model.num_classes, "global_pool": "avg", "embed_dim": first.width,
        "depths": tuple(s.depth for s in stages), "num_heads": tuple(s.heads for s in stages), "head_dim": None,
        "window_size": tuple(s.window for s in stages), "always_partition": False,
        "mlp_ratio": tuple(ratio_of(s.width, s.mlp) for s in stages), "qkv_bias": model.qkv_bias != "none",
        "embed_layer": "PatchEmbed", "norm_layer": "layernorm", "norm_eps": model.norm_eps,
    }  # fmt: skip
    if len(stages) == 2:  # two numbers are rows and columns of all windows there
        values["window_size"] = tuple((s.window, s.window) for s in stages)
    return Constructor(name=SWIN, arguments=values)


def rules(model: ModelConfig, made: Constructor) -> list[Rule]:
    """Between the tensors of our model and those of theirs."""
    m, sizes = model, model.sizes
    width = sizes.stages[0].width
    kernel = (width, sizes.channels, sizes.patch, sizes.patch)
    found = [rule("embed.weight", "patch_embed.proj.weight", way=Same((width, sizes.patch_features), kernel))]
    found.append(bias_rule("embed.bias", "patch_embed.proj.bias", width, bool(m.patch_bias)))
    found += norm_rules("embed.norm", "patch_embed.norm", m, width)
    number = 0
    for s in sizes.stages:
        if s.index:
            ours, theirs = f"merges.{s.index - 1}", f"layers.{s.index}.downsample"
            found += [rule(f"{ours}.norm.{k}", f"{theirs}.norm.{k}") for k in ("weight", "bias")]
            found.append(rule(f"{ours}.proj.weight", f"{theirs}.reduction.weight"))
        for i in range(s.depth):
            found += _block(m, s.index, f"blocks.{number}.", f"layers.{s.index}.blocks.{i}.")
            number += 1
    found += norm_rules("head.norm", "norm", m, sizes.last.width)
    if m.num_classes:
        found.append(rule("head.fc.weight", "head.fc.weight"))
        found.append(bias_rule("head.fc.bias", "head.fc.bias", m.num_classes, bool(m.classifier_bias)))
    return found


def _block(m: ModelConfig, stage: int, ours: str, theirs: str) -> list[Rule]:
    here = m.sizes.stages[stage]
    high, wide = here.window_sides
    offsets = (2 * high - 1) * (2 * wide - 1)
    found = [*norm_rules(f"{ours}norm1", f"{theirs}norm1", m, here.width)]
    found += norm_rules(f"{ours}norm2", f"{theirs}norm2", m, here.width)
    found += qkv_rules(m, here.width, f"{ours}attn.qkv", f"{theirs}attn.qkv")
    table = Permuted((offsets, here.heads), (1, 0), (here.heads, offsets))
    found.append(
        rule(f"{ours}attn.core.mixer.relative_position", f"{theirs}attn.relative_position_bias_table", way=table)
    )
    names = ("attn.proj", "mlp.fc1", "mlp.fc2")
    return found + [rule(f"{ours}{x}.{k}", f"{theirs}{x}.{k}") for x in names for k in ("weight", "bias")]
