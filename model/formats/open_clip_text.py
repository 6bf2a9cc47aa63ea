"""Text towers of open_clip's configuration files (`text_cfg`): which keys have a meaning here, which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.formats.base import Pairing
from model.formats.open_clip_config import BLOCKS, blocks_cfg_for, gelu_of, keys_of
from model.formats.pairs import ALONE
from model.projection import Projection
from model.text import TextConfig

READ: dict[str, Any] = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "ls_init_value": None, "eos_id": 2, "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False,
    "proj_type": "linear", "act_kwargs": None, "norm_kwargs": None, "block_type": None,
}  # fmt: skip
REFUSED: dict[str, Any] = {  # unless they are this
    "embed_cls": False, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "hf_model_name": None,
}  # fmt: skip
KNOWN = {  # how texts are made, or without a meaning for its TextTransformer
    "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "final_ln_after_pool", "output_tokens",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
_POOLS = {"argmax": "eos", "eos": "eos", "last": "last"}
_CHOICES = {"pool_type": tuple(_POOLS), "proj_type": ("linear", "none"), "block_type": BLOCKS}
_END = 1  # of sentencepiece's vocabularies; by it other tokens are told, where the last one is pooled


def text_of(path: Path, cfg: Mapping[str, Any]) -> TextConfig:
    """Our text tower, not resolved, of a `model_cfg`. Raises ConversionError, by key, for what this program has not."""
    t = keys_of(
        path, "text_cfg", cfg, read=READ, refused=REFUSED, known=KNOWN, choices=_CHOICES, what="this text tower",
        cure=f"; {ALONE}",
    )  # fmt: skip
    ends = {"argmax": t["vocab_size"] - 1, "eos": t["eos_id"], "last": min(_END, t["vocab_size"] - 1)}
    linear = t["proj_type"] == "linear"
    return TextConfig(
        width=t["width"],
        depth=t["layers"],
        num_heads=t["heads"],
        mlp_dim=int(t["width"] * t["mlp_ratio"]),
        context_length=t["context_length"],
        vocabulary_size=t["vocab_size"],
        end_token=ends[t["pool_type"]],
        attention="full" if t["no_causal_mask"] else "causal",
        pool=_POOLS[t["pool_type"]],  # type: ignore[arg-type]
        norm_eps=(t["norm_kwargs"] or {}).get("eps", 1e-5),
        layer_scale=None if t["ls_init_value"] is None else t["ls_init_value"] or 1e-5,  # 0 is none here
        gelu=gelu_of(cfg, t),
        projection="linear" if linear else "none",
        projection_bias=bool(t["proj_bias"]) and linear,
    )


def text_cfg_for(p: Pairing, m: ModelConfig, projection: Projection, before: Mapping[str, Any]) -> dict[str, Any]:
    """Of a text tower of ours, which open_clip has: what was there before, where it says the same.

    Args:
        m: it as a model. projection: of it.
    """
    last, text, old = m.sizes.last, p.text, READ | dict(before)
    assert text.vocabulary_size is not None and text.end_token is not None
    pool = {"last": "last", "eos": "argmax" if text.end_token == text.vocabulary_size - 1 else "eos"}[str(text.pool)]
    if pool == "argmax" and old["pool_type"] == "eos" and old["eos_id"] == text.end_token:
        pool = "eos"
    new = blocks_cfg_for(m, old) | {
        "context_length": text.context_length,
        "vocab_size": text.vocabulary_size,
        "heads": m.num_heads,
        "eos_id": text.end_token if pool == "eos" else old["eos_id"],
        "no_causal_mask": "full" in last.kinds,
        "pool_type": pool,
        "proj_bias": bool(text.projection_bias),
        "proj_type": "linear" if projection == "linear" else "none",
    }
    return dict(before) | {key: value for key, value in new.items() if (old[key] or None) != (value or None)}
