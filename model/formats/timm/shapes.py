"""timm's constructor arguments from the shapes of its tensors, for a file that says nothing else.

What shapes do not tell is taken from keys of our model that are given, and never guessed; only that images are square,
as timm itself takes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from model.formats.base import ConversionError, Shape
from model.formats.timm.arguments import DEFAULTS, DISTILLED, SWIN, VIT, Constructor

_ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
_POOLS = {"cls": "token", "gap": "avg", "map": "map"}
_FLAGS = {
    "num_heads": "N", "norm_eps": "1e-6", "gelu": "erf, tanh or quick", "pool": "cls or gap", "image_size": "N",
}  # fmt: skip
_OTHERS = {  # names that tensors of other classes have
    "blocks.0.attns.0.": "VisionTransformer with ParallelThingsBlock",
    "blocks.0.attn.lambda_": "differential attention",
    "blocks.0.lambda_": "DiffParallelScalingBlock",
    "blocks.0.mlp.fc1_g.": "VisionTransformer with SwiGLU, or Eva",
    "blocks.0.attn.q_proj.": "Eva",
    "blocks.0.attn.relative_position_bias_table": "Beit",
    "blocks.0.gamma_1": "Beit",
    "blocks.0.attn.rel_pos": "a ViT with relative positions",
    "blocks.0.attn.gate.": "gated attention",
    "blocks.0.mlp.norm.": "BEiT-3",
    "embeds.": "NaFlexVit",
    "patch_embed.backbone.": "a ViT on a ResNet",
    "layers.0.blocks.0.attn.logit_scale": "SwinTransformerV2",
    "pos_embed_win": "Hiera without a config.json",
    "blocks.0.proj.": "Hiera without a config.json",
    "head.norm.": "Hiera without a config.json",
    "layers.0.downsample.": "Swin as Microsoft publishes it (timm loads and saves it with other names)",
}


def made_from(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> Constructor:
    """What timm was called with.

    Raises:
        ConversionError: the tensors are of a class that is not read, or keys are to be given: which, by their flags.
    """
    swin = any(name.startswith("layers.0.") for name in shapes)
    for start, what in _OTHERS.items():
        if any(name.startswith(start) for name in shapes):
            raise ConversionError(f"timm's {what} is not read: tensors are called {start}")
    found, missing = _swin(shapes, given) if swin else _vit(shapes, given)
    if missing:
        flags = " ".join(f"--model.{key} {_FLAGS[key]}" for key in missing)
        raise ConversionError(
            f"tensors alone do not say {', '.join(f'model.{key}' for key in missing)} of timm's model: give {flags}, "
            'or a config.json with its architecture (--source_config FILE: {"architecture": "vit_base_patch16_224"})'
        )
    name = SWIN if swin else DISTILLED if "dist_token" in shapes else VIT
    return Constructor(name=name, arguments=DEFAULTS[name] | found)


def _depth(shapes: Mapping[str, Shape], start: str) -> int:
    found = [m.group(1) for name in shapes if (m := re.match(re.escape(start) + r"(\d+)\.", name))]
    return 1 + max(map(int, found), default=-1)


def _vit(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(arguments, keys of our model that are needed)."""
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    parallel, learned = "blocks.0.in_proj.weight" in shapes, "pos_embed" in shapes
    hidden, gated = _hidden(shapes, width, parallel)
    token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0, 0))[1]
    prefix = token + ("dist_token" in shapes) + registers
    grid = _grid(shapes["pos_embed"][1] if learned else None, prefix, patch, given)
    known = _known(shapes, given, width, gated)
    missing = [key for key, value in known.items() if value is None] + ["image_size"] * (grid is None)
    size, embeds_prefix = grid or ((0, 0), False)
    return {
        **_parts(shapes, "blocks.0." if parallel else "blocks.0.attn."), "img_size": size, "patch_size": patch,
        "in_chans": channels, "embed_dim": width, "num_classes": shapes.get("head.weight", (0,))[0],
        "depth": _depth(shapes, "blocks."), "num_heads": known["num_heads"], "mlp_ratio": (hidden + 0.5) / width,
        "global_pool": _POOLS.get(str(known["pool"])), "norm_eps": known["norm_eps"],
        "act_layer": _ACTIVATIONS.get(str(known["gelu"]), "silu"), "class_token": token, "reg_tokens": registers,
        "pos_embed": "learn" if learned else "none", "no_embed_class": not embeds_prefix,
        "block_fn": "ParallelScalingBlock" if parallel else "Block", "mlp_layer": "SwiGLUPacked" if gated else "Mlp",
    }, missing  # fmt: skip


def _known(shapes: Mapping[str, Shape], given: Mapping[str, Any], width: int, gated: bool) -> dict[str, Any]:
    """Keys of our model, those that shapes tell as they tell them; None for what nobody does."""
    known: dict[str, Any] = {key: given.get(key) for key in ("num_heads", "norm_eps", "gelu", "pool")}
    norm = shapes.get("blocks.0.attn.q_norm.weight", shapes.get("blocks.0.q_norm.weight"))
    if norm is not None:
        known["num_heads"] = width // norm[0]
    if gated:
        known["gelu"] = "none"
    if "attn_pool.latent" in shapes:
        known["pool"] = "map"
    elif "cls_token" not in shapes or "dist_token" in shapes:
        known["pool"] = "cls" if "dist_token" in shapes else "gap"
    return known


def _parts(shapes: Mapping[str, Shape], attention: str) -> dict[str, Any]:
    """Arguments that say which tensors there are."""
    scale = "blocks.0.ls.gamma" in shapes or "blocks.0.ls1.gamma" in shapes
    layernorm = "blocks.0.norm1.bias" in shapes or "blocks.0.in_norm.bias" in shapes
    return {
        "qkv_bias": f"{attention}in_proj.bias" in shapes or f"{attention}qkv.bias" in shapes,
        "qk_norm": f"{attention}q_norm.weight" in shapes,
        "proj_bias": f"{attention}proj.bias" in shapes or f"{attention}attn_out_proj.bias" in shapes,
        "init_values": 1e-5 if scale else None,
        "pre_norm": "norm_pre.weight" in shapes,
        "final_norm": "norm.weight" in shapes or "fc_norm.weight" in shapes,
        "fc_norm": "fc_norm.weight" in shapes,
        "norm_layer": "layernorm" if layernorm else "rmsnorm",
    }


def _hidden(shapes: Mapping[str, Shape], width: int, parallel: bool) -> tuple[int, bool]:
    """(of the first matrix of the MLP: features, whether half of them are gates)."""
    if parallel:
        return shapes["blocks.0.in_proj.weight"][0] - 3 * width, False
    first, second = shapes["blocks.0.mlp.fc1.weight"][0], shapes["blocks.0.mlp.fc2.weight"][1]
    return first, first == 2 * second


def _grid(rows: int | None, prefix: int, patch: int, given: Mapping[str, Any]) -> tuple[tuple[int, int], bool] | None:
    """(image size, whether prefix tokens have positions) of a table of so many rows; None if it does not tell."""
    size = given.get("image_size")
    sizes = [] if size is None else [(size, size) if isinstance(size, int) else tuple(size)]
    if rows is None:
        return (sizes[0], False) if sizes else None
    for of_prefix in (0, prefix) if prefix else (0,):
        side = math.isqrt(rows - of_prefix)
        if size is None and side * side == rows - of_prefix:
            sizes.append((side * patch, side * patch))
    fitting = [
        (s, bool(of_prefix))
        for s in sizes
        for of_prefix in {0, prefix}
        if (s[0] // patch) * (s[1] // patch) + of_prefix == rows
    ]
    return fitting[0] if len(fitting) == 1 else None


def _swin(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `_vit`. All of timm's have one epsilon, one GELU and one pooling, and tables tell heads and windows."""
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    stages = range(_depth(shapes, "layers."))
    tables = [shapes[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    hidden = [shapes[f"layers.{i}.blocks.0.mlp.fc1.weight"][0] for i in stages]
    windows = tuple((math.isqrt(offsets) + 1) // 2 for offsets, _ in tables)
    size = given.get("image_size")
    return {
        "img_size": size if size is None or isinstance(size, int) else tuple(size), "patch_size": patch,
        "in_chans": channels, "embed_dim": width, "num_classes": shapes.get("head.fc.weight", (0,))[0],
        "depths": tuple(_depth(shapes, f"layers.{i}.blocks.") for i in stages),
        "num_heads": tuple(heads for _, heads in tables), "window_size": windows,
        "mlp_ratio": tuple((m + 0.5) / (width * 2**i) for i, m in enumerate(hidden)),
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in shapes,
    }, ["image_size"] * (size is None)  # fmt: skip
