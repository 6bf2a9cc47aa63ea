"""Published architectures, as values of ModelConfig's keys.

Shapes: Ti, S, B, L, H from Touvron et al. 2021 (DeiT) and Dosovitskiy et al. 2021; g, G from Zhai et al. 2022 (Scaling
Vision Transformers); e from Chen et al. 2022 (PaLI); 22B from Dehghani et al. 2023. A number after the name is the
patch size.
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
}
