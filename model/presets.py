"""Published architectures, as values of ModelConfig's keys.

Shapes: Ti, S, B, L, H from Touvron et al. 2021 (DeiT) and Dosovitskiy et al. 2021; g, G from Zhai et al. 2022 (Scaling
Vision Transformers); e from Chen et al. 2022 (PaLI); 22B from Dehghani et al. 2023; SigLIP 2 g-opt from Tschannen et
al. 2025; InternViT-6B from Chen et al. 2023; DINOv3-7B from Siméoni et al. 2025. A number after the name is the patch
size. swin_t is from Liu et al. 2021; hiera_b has the shapes of Ryali et al. 2023, with patch merges in the place of
pooled queries.
"""

from __future__ import annotations

from typing import Any


def _classic(width: int, depth: int, heads: int, mlp: int, patch: int) -> dict[str, Any]:
    """The original ViT: pre-norm blocks one after the other, a class token, one table of positions."""
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": mlp,
        "patch_size": patch,
        "image_size": 224,
        "block": "sequential",
        "position": "learned_1d",
        "pool": "cls",
    }


def _pyramid(*stages: tuple[Any, ...]) -> dict[str, Any]:
    """Stages of (depth, width, heads, kinds of attention, window size)."""
    keys = ("depth", "width", "num_heads", "attention", "window_size")
    return {
        "stages": tuple(dict(zip(keys, stage, strict=False)) for stage in stages),
        "patch_size": 4,
        "image_size": 224,
        "window_size": 7,
        "position": "learned_2d",
        "pool": "gap",
    }


PRESETS: dict[str, dict[str, Any]] = {
    "vit_ti16": _classic(192, 12, 3, 768, 16),
    "vit_s16": _classic(384, 12, 6, 1536, 16),
    "vit_b16": _classic(768, 12, 12, 3072, 16),
    "vit_l16": _classic(1024, 24, 16, 4096, 16),
    "vit_h14": _classic(1280, 32, 16, 5120, 14),
    "vit_g14": _classic(1408, 40, 16, 6144, 14),
    "vit_gg14": _classic(1664, 48, 16, 8192, 14),
    "vit_e14": _classic(1792, 56, 16, 15360, 14) | {"pool": "map"},
    "vit_22b": {
        "width": 6144,
        "depth": 48,
        "num_heads": 48,
        "mlp_dim": 24576,
        "patch_size": 14,
        "image_size": 224,
        "block": "parallel",
        "qk_norm": True,
        "bias": False,
        "gelu": "tanh",
        "position": "learned_2d",
        "pool": "map",
    },
    "siglip2_gopt16": _classic(1536, 40, 16, 6144, 16) | {"image_size": 256, "pool": "map", "gelu": "tanh"},
    "internvit_6b": _classic(3200, 48, 25, 12800, 14)
    | {
        "image_size": 448,
        "norm": "rmsnorm",
        "qk_norm": True,
        "qk_norm_over": "width",
        "bias": False,
        "layer_scale": 0.1,
    },
    "dinov3_7b": _classic(4096, 40, 32, 8192, 16)
    | {
        "image_size": 256,
        "mlp": "swiglu",
        "position": "rope_2d",
        "registers": 4,
        "layer_scale": 1e-5,
        "norm_eps": 1e-5,
        "qkv_bias": "none",
    },
    "swin_t": _pyramid(
        (2, 96, 3, "window, shifted_window"),
        (2, 192, 6, "window, shifted_window"),
        (6, 384, 12, "[window, shifted_window] * 3"),
        (2, 768, 24, "window, shifted_window"),
    )
    | {"position": "none", "pre_norm": True, "relative_position": True, "norm_eps": 1e-5},
    "hiera_b": _pyramid((2, 96, 1, "window", 8), (3, 192, 2, "window", 4), (16, 384, 4, "full"), (3, 768, 8, "full")),
}
