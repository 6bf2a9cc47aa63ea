"""Text towers of open_clip's configuration files (`text_cfg`): which keys have a meaning here, which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Pairing
from model.formats.open_clip_config import ratio_of
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
_PROJECTIONS = ("linear", "none")
_END = 1  # of sentencepiece's vocabularies; by it other tokens are told, where the last one is pooled


def text_of(path: Path, cfg: Mapping[str, Any]) -> TextConfig:
    """Our text tower, not resolved, of a `model_cfg`. Raises ConversionError, by key, for what this program has not."""
    there: Mapping[str, Any] = cfg["text_cfg"]
    for key, value in there.items():
        if key not in READ and key not in REFUSED and key not in KNOWN:
            raise ConversionError(f"{path}: text_cfg.{key} {value!r} is not known to this program; {ALONE}")
        if key in REFUSED and value != REFUSED[key] and value:
            raise ConversionError(f"{path}: text_cfg.{key} is {value!r}, which this text tower has not; {ALONE}")
    t = READ | {key: value for key, value in there.items() if key in READ}
    for key, choices in (("pool_type", tuple(_POOLS)), ("proj_type", _PROJECTIONS), ("block_type", _BLOCKS)):
        if t[key] not in choices:
            raise ConversionError(f"{path}: text_cfg.{key} is {t[key]!r}: this text tower has {choices} alone; {ALONE}")
    for key, names in {"act_kwargs": {"approximate"}, "norm_kwargs": {"eps"}}.items():
        if strange := sorted(set(t[key] or {}) - names):
            raise ConversionError(f"{path}: text_cfg.{key} has {strange[0]}, which this model has not; {ALONE}")
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
        gelu=_gelu(t["act_kwargs"], quick=bool(cfg.get("quick_gelu"))),  # type: ignore[arg-type]
        projection="linear" if linear else "none",
        projection_bias=bool(t["proj_bias"]) and linear,
    )


_BLOCKS = (None, "default", "custom")  # which, without what is refused, are the same


def _gelu(acts: Mapping[str, Any] | None, *, quick: bool) -> str:
    if quick:
        return "quick"
    return "tanh" if (acts or {}).get("approximate") == "tanh" else "erf"


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
    acts, norms = dict(old["act_kwargs"] or {}), dict(old["norm_kwargs"] or {})
    acts.pop("approximate", None)
    if norms.get("eps", 1e-5) != m.norm_eps:
        norms["eps"] = m.norm_eps
    if m.gelu == "tanh":
        acts["approximate"] = "tanh"
    ratio = old["mlp_ratio"] if int(last.width * old["mlp_ratio"]) == last.mlp else ratio_of(last.mlp, last.width)
    scale = m.layer_scale or None
    new = {
        "context_length": text.context_length,
        "vocab_size": text.vocabulary_size,
        "width": m.width,
        "heads": m.num_heads,
        "layers": m.depth,
        "mlp_ratio": ratio,
        "ls_init_value": old["ls_init_value"] if scale and old["ls_init_value"] == 0 else scale,
        "eos_id": text.end_token if pool == "eos" else old["eos_id"],
        "no_causal_mask": "full" in last.kinds,
        "pool_type": pool,
        "proj_bias": bool(text.projection_bias),
        "proj_type": "linear" if projection == "linear" else "none",
        "act_kwargs": acts or None,
        "norm_kwargs": norms or None,
    }
    return dict(before) | {key: value for key, value in new.items() if (old[key] or None) != (value or None)}
