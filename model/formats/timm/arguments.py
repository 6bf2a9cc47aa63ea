"""The constructor arguments of timm's models: what a config.json means, whose other half is in timm's own code.

An architecture (`vit_base_patch16_siglip_224`) is a function of timm that knows some arguments; a config.json names it
and gives others beside it. Here all of them are one dictionary, in values that JSON has: classes by their names, and
`norm_layer` in two, a name and `norm_eps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.formats.base import ConversionError
from model.formats.timm.architectures import ARCHITECTURES

VIT, DISTILLED, SWIN, HIERA = "VisionTransformer", "VisionTransformerDistilled", "SwinTransformer", "Hiera"

_VIT_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "global_pool": "token", "embed_dim": 768,
    "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False, "scale_attn_norm": False,
    "scale_mlp_norm": False, "proj_bias": True, "init_values": None, "class_token": True, "pos_embed": "learn",
    "no_embed_class": False, "reg_tokens": 0, "pre_norm": False, "final_norm": True, "fc_norm": None,
    "pool_include_prefix": False, "embed_layer": "PatchEmbed", "embed_norm_layer": None, "norm_layer": "layernorm",
    "norm_eps": 1e-6, "act_layer": "gelu", "block_fn": "Block", "mlp_layer": "Mlp", "attn_layer": "attn",
    "dynamic_img_pad": False,
}  # fmt: skip
_SWIN_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 4, "in_chans": 3, "num_classes": 1000, "global_pool": "avg", "embed_dim": 96,
    "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "head_dim": None, "window_size": 7, "always_partition": False,
    "mlp_ratio": 4.0, "qkv_bias": True, "embed_layer": "PatchEmbed", "norm_layer": "layernorm", "norm_eps": 1e-5,
}  # fmt: skip
_HIERA_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "in_chans": 3, "num_classes": 1000, "global_pool": "avg", "embed_dim": 96, "num_heads": 1,
    "stages": (2, 3, 16, 3), "q_pool": 3, "q_stride": (2, 2), "mask_unit_size": (8, 8),
    "mask_unit_attn": (True, True, False, False), "use_expand_proj": True, "dim_mul": 2.0, "head_mul": 2.0,
    "patch_kernel": (7, 7), "patch_stride": (4, 4), "patch_padding": (3, 3), "mlp_ratio": 4.0, "init_values": None,
    "norm_layer": "layernorm", "norm_eps": 1e-6, "sep_pos_embed": False, "abs_win_pos_embed": False,
    "global_pos_size": (14, 14),
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    VIT: _VIT_DEFAULTS, DISTILLED: _VIT_DEFAULTS, SWIN: _SWIN_DEFAULTS, HIERA: _HIERA_DEFAULTS,
}  # fmt: skip

_OFF = ("features_only", "use_naflex", "pruned")
_NO_MATTER = {  # of training, of first weights, of images of other sizes than its own, of how it is run
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "drop_block_rate", "weight_init", "fix_init", "head_init_scale", "dynamic_img_size", "strict_img_size",
    "device", "dtype", "out_indices", "pretrained_strict", "scriptable", "exportable", "no_jit",
    "cache_dir", *_OFF,
}  # fmt: skip
_OTHERS = {  # first parts of the names of architectures of other classes
    "vit_relpos": "VisionTransformerRelPos", "vit_srelpos": "VisionTransformerRelPos", "samvit": "VisionTransformerSAM",
    "naflexvit": "NaFlexVit", "vitamin": "ViTamin", "eva": "Eva", "vit_pe": "Eva", "vit_small_patch16_rope": "Eva",
    "vit_base_patch16_rope": "Eva", "vit_large_patch16_rope": "Eva", "vit_medium_patch16_rope": "Eva",
    "beit_": "Beit", "beitv2": "Beit", "swinv2_cr": "SwinTransformerV2Cr", "swinv2": "SwinTransformerV2",
    "sam2": "HieraDet", "vit_small_r": "a ViT on a ResNet", "vit_base_r": "a ViT on a ResNet",
    "vit_large_r": "a ViT on a ResNet", "vit_tiny_r": "a ViT on a ResNet",
}  # fmt: skip
_SAMPLE = "vit_base_patch16_224"


@dataclass(frozen=True, kw_only=True)
class Constructor:
    """A class of timm's and the arguments that it is called with, all of those that change what it computes.

    Attributes:
        name: of the class. arguments: by name, in values that JSON has.
    """

    name: str
    arguments: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        """One of the arguments."""
        return self.arguments[key]


def constructor_of(config: Mapping[str, Any]) -> Constructor:
    """What timm calls for a config.json: its `model_args` come first, then the architecture's own arguments, then what
    `pretrained_cfg` says, then the class's defaults.

    Raises:
        ConversionError: the architecture, or an argument, is none that this program knows.
    """
    name, own = known_architecture(config)
    given, images = dict(config.get("model_args") or {}), pretrained_cfg_of(config)
    for key in _OFF:
        if given.get(key):
            raise ConversionError(f"model_args {key} {given[key]}: a model of another kind than its tensors are of")
    defaults = DEFAULTS[name]
    if strange := sorted(k for k in given if k not in defaults and k not in _NO_MATTER):
        raise ConversionError(f"model_args {strange[0]} {given[strange[0]]!r}: timm's {name} has no such argument here")
    found: dict[str, Any] = {"num_classes": config.get("num_classes", images.get("num_classes"))}
    size = images.get("input_size")
    if size:
        found["in_chans"] = size[0]
        found |= {"img_size": tuple(size[1:])} if images.get("fixed_input_size") else {}
    given = {k: v for k, v in given.items() if v is not None and k in defaults}
    if "norm_layer" in given:  # timm makes it with its own epsilon then
        given = {"norm_eps": 1e-6, **given, "norm_layer": str(given["norm_layer"]).replace("_", "").lower()}
    values = defaults | {k: v for k, v in found.items() if v is not None} | own | given
    if (pool := config.get("global_pool", values["global_pool"])) != values["global_pool"]:
        raise ConversionError(
            f"config.json says global_pool {pool}, but timm makes this model with {values['global_pool']}: say it in "
            "its model_args too"
        )
    return Constructor(name=name, arguments={k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def known_architecture(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(class, arguments) of the architecture that a config.json names. Raises ConversionError if it is not known."""
    architecture = str(config.get("architecture")).partition(".")[0]
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    kinds = [what for start, what in _OTHERS.items() if architecture.startswith(start)]
    what = f"timm's {architecture} is of {kinds[0]}" if kinds else f"timm's architecture {architecture} is not known"
    raise ConversionError(
        f"{what}: of timm's models those of {', '.join(DEFAULTS)} are read, as {_SAMPLE} "
        "(model/formats/timm/architectures.py has them all)"
    )


def pretrained_cfg_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of a model's images; old files have it beside the architecture."""
    found = config.get("pretrained_cfg", config)
    if not isinstance(found, Mapping):
        raise ConversionError("pretrained_cfg of config.json is no table")
    return found
