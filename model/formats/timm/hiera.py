"""timm's Hiera (Ryali et al. 2023), as far as our model is one: constructor arguments, our model, rules.

Published ones embed patches that overlap and pool their queries by the maximum between stages, which ours does not.
What is left without is a ViT of one width, whose blocks attend within windows or everywhere.
"""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError
from model.formats.rules import Rule, rule
from model.formats.timm.arguments import Constructor
from model.formats.timm.common import bias_rule, mlp_of, norm_rules, qkv_rules, refuse_unless
from model.formats.ways import Same

_PLAIN: dict[str, set[Any]] = {
    "q_pool": {0}, "patch_padding": {(0, 0)}, "sep_pos_embed": {False}, "abs_win_pos_embed": {False},
    "global_pool": {"avg"}, "norm_layer": {"layernorm"},
}  # fmt: skip


def model_of(made: Constructor) -> ModelConfig:
    """Our model. Raises ConversionError, by name, for an argument that ours has not."""
    refuse_unless(made, _PLAIN)
    a, stages = made.arguments, tuple(made["stages"])
    patch, windows = a["patch_stride"], tuple(side ** (len(stages) - 1) for side in a["q_stride"])
    if len(stages) > 1:
        refuse_unless(made, {"dim_mul": {1}, "head_mul": {1}})
    refuse_unless(made, {"patch_kernel": {patch}, "patch_stride": {(patch[0], patch[0])}})
    kinds = _kinds(stages, a["mask_unit_attn"])
    if "window" in kinds:  # tokens of a unit lie together if their order is unrolled down to it
        refuse_unless(made, {"mask_unit_size": {windows}, "q_stride": {(a["q_stride"][0],) * 2}})
    size = a["img_size"]
    rows, cols = (size, size) if isinstance(size, int) else size
    unit = patch[0] * (windows[0] if "window" in kinds else 1)
    if rows % unit or cols % unit:
        raise ConversionError(f"timm's {made.name} has img_size {size}, which is no whole patches or mask units")
    return ModelConfig(
        image_size=rows if rows == cols else (rows, cols),
        patch_size=patch[0],
        in_channels=a["in_chans"],
        width=a["embed_dim"],
        depth=len(kinds),
        num_heads=a["num_heads"],
        mlp_dim=mlp_of(a["embed_dim"], a["mlp_ratio"]),
        norm_eps=a["norm_eps"],
        layer_scale=float(a["init_values"] or 0),
        position="learned_1d",
        attention=kinds,
        window_size=windows[0] if "window" in kinds else None,
        pool="gap",
        norm_after_pool=True,
        num_classes=a["num_classes"],
    ).resolve()


def _kinds(stages: tuple[int, ...], units: tuple[bool, ...]) -> tuple[str, ...]:
    """Of attention, of each block: the first of a stage attends as the stage before."""
    own = [stage for stage, depth in enumerate(stages) for _ in range(depth)]
    late = [own[0], *own[:-1]]
    return tuple("window" if units[stage] else "full" for stage in late)


def rules(model: ModelConfig, made: Constructor) -> list[Rule]:
    """Between the tensors of our model and those of theirs."""
    sizes, width = model.sizes, model.sizes.last.width
    count = sizes.last.rows * sizes.last.cols
    kernel = (width, sizes.channels, sizes.patch, sizes.patch)
    found = [
        rule("embed.weight", "patch_embed.proj.weight", way=Same((width, sizes.patch_features), kernel)),
        rule("embed.bias", "patch_embed.proj.bias"),
        rule("embed.pos", "pos_embed", way=Same((count, width), (1, count, width))),
    ]
    for i in range(sizes.depth):
        at = f"blocks.{i}."
        found += norm_rules(f"{at}norm1", f"{at}norm1", model, width)
        found += norm_rules(f"{at}norm2", f"{at}norm2", model, width)
        found += qkv_rules(model, width, f"{at}attn.qkv", f"{at}attn.qkv")
        names = ("attn.proj", "mlp.fc1", "mlp.fc2")
        found += [rule(f"{at}{x}.{k}", f"{at}{x}.{k}") for x in names for k in ("weight", "bias")]
        found += [rule(f"{at}scale{k}", f"{at}ls{k}.gamma") for k in (1, 2) if model.layer_scale]
    found += norm_rules("head.norm", "head.norm", model, width)
    if model.num_classes:
        found += [rule("head.fc.weight", "head.fc.weight"), bias_rule("head.fc.bias", "head.fc.bias", 0, has=True)]
    return found
